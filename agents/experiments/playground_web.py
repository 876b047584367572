"""The playground's page and its server, for ``vartext play --web``. Needs the extra `web`; see ``playground.py``.

The page asks for one grid at a time, so that it shows the image as it grows and can stop. What a page may ask for is
`Limits`; what it may not is refused with a status and a message: 422 what cannot be drawn, 404 a page that was
forgotten, 413 a request that is too large, 429 too many that wait.
"""

import argparse
import asyncio
import base64
import io
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from agents.experiments.loading import load_policy, policy_at
from agents.experiments.options import clear_errors, decoding_from
from agents.experiments.playground import Drawing, Frame, Limits, Player, Players, Session, Sessions
from agents.sampling import Decoding
from rewards import make
from rewards.reason import reason
from rewards.serving.address import is_loopback, listen
from var_env.seeding import as_seed

if TYPE_CHECKING:
    from fastapi import FastAPI

EXTRA = "--web needs an extra: pip install 'vartext[web]'"
TEMPERATURE, GUIDANCE = 100.0, 100.0  # the most that a page may ask for: what is far beyond is not finite


class Asked(dict[str, Any]):
    """What a request holds, its fields checked as they are read: ``ValueError`` names the field."""

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a text, got {value!r:.80}")
        return value

    def whole(self, name: str) -> int:
        value = self.get(name)
        if type(value) is not int:
            raise ValueError(f"{name} must be a whole number, got {value!r:.80}")
        return value

    def number(self, name: str, most: float) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise ValueError(f"{name} must be a number from 0 to {most:g}, got {value!r:.80}")
        return float(value)

    def side(self) -> int:
        side = self.whole("side")
        if side not in (0, 1):
            raise ValueError(f"side must be 0 or 1, got {side}")
        return side

    def seed(self) -> int:
        return as_seed(self.get("seed"))

    def tokens(self) -> list[int]:
        tokens = self.get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ValueError(f"tokens must be a list of whole numbers, got {tokens!r:.80}")
        return tokens

    def decoding(self) -> Decoding:
        return Decoding(
            self.number("temperature", TEMPERATURE),
            self.whole("top_k"),
            self.number("top_p", 1.0),
            self.number("guidance", GUIDANCE),
        )


def create_app(players: Players, start: dict[str, Any], limits: Limits | None = None) -> "FastAPI":
    """The playground as an ASGI application.

    Args:
        players: the policies to choose from.
        start: what the page's form holds at first, by field.
        limits: `Limits`, the default ones by default.
    """
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import HTMLResponse

    limits = limits or Limits()
    sessions = Sessions(limits.sessions)
    turn = asyncio.Semaphore(limits.at_once)
    waiting = 0
    page = resources.files("agents.experiments").joinpath("playground.html").read_text(encoding="utf-8")

    async def content(request: Request) -> Asked:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.body_bytes:
                raise HTTPException(413, f"the request has more than {limits.body_bytes} bytes")
        try:
            return Asked(_object(bytes(body)))
        except ValueError as error:
            raise HTTPException(422, reason(error)) from None

    def endpoint(answer: Callable[[Session, Asked], dict[str, Any]]) -> Callable[[Request], Any]:
        """A POST request that draws, in its turn."""

        async def handle(request: Request) -> dict[str, Any]:
            nonlocal waiting
            asked = await content(request)
            try:
                session = sessions.get(asked.text("session"))
                if waiting >= limits.at_once + limits.waiting:
                    raise HTTPException(
                        429, f"{limits.waiting} requests wait already: try again in a moment", {"Retry-After": "1"}
                    )
                waiting += 1
                try:
                    async with turn:
                        return await run_in_threadpool(_locked, answer, session, asked)
                finally:
                    waiting -= 1
            except KeyError as error:
                raise HTTPException(404, str(error.args[0])) from None
            except (OSError, RuntimeError, ValueError) as error:
                raise HTTPException(422, reason(error)) from None

        return handle

    def draw(session: Session, asked: Asked) -> dict[str, Any]:
        """Begin an image, and draw nothing yet."""
        side, prompt = asked.side(), asked.text("prompt")
        player = players.get(asked.text("policy"))
        drawing = Drawing(player, prompt, asked.decoding(), asked.seed(), limits)
        session.drawings[side] = drawing
        return {"grids": [name for name, _ in player.bands], "notes": player.notes(prompt)}

    def step(session: Session, asked: Asked) -> dict[str, Any]:
        return _frame(session.drawing(asked.side()).sample())

    def back(session: Session, asked: Asked) -> dict[str, Any]:
        """Forget grid ``band`` and those after it, and go on with other noise."""
        drawing = session.drawing(asked.side())
        decoding, seed = asked.decoding(), asked.seed()
        drawing.back_to(asked.whole("band"))
        drawing.decode_with(decoding, seed)
        return {}

    def write(session: Session, asked: Asked) -> dict[str, Any]:
        """Give grid ``band`` by hand. Those after it are forgotten."""
        return _frame(session.drawing(asked.side()).write(asked.whole("band"), asked.tokens()))

    def suffixes(session: Session, asked: Asked) -> dict[str, Any]:
        drawing, count = session.drawing(asked.side()), asked.whole("count")
        frames, value = drawing.suffixes(asked.whole("band"), count, asked.decoding(), asked.seed())
        return {"frames": [_frame(frame) for frame in frames], "middle_return": value}

    def codes(session: Session, asked: Asked) -> dict[str, Any]:
        sheet, columns, tile = session.drawing(asked.side()).codes(asked.whole("band"))
        count = session.drawing(asked.side()).envs.tokenizer.vocab_size
        return {"sheet": png(sheet), "columns": columns, "tile": tile, "count": count}

    app = FastAPI(title="VARText playground", docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/", response_class=HTMLResponse)(lambda: page)
    options = {"policies": players.names, "start": start, "limits": vars(limits)}
    app.post("/api/session")(lambda: {"session": sessions.open(), **options})
    for answer in (draw, step, back, write, suffixes, codes):
        app.post(f"/api/{answer.__name__}")(endpoint(answer))
    return app


def _locked(answer: Callable[[Session, Asked], dict[str, Any]], session: Session, asked: Asked) -> dict[str, Any]:
    with session.lock:
        return answer(session, asked)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"the request is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"the request must be a JSON object, got {value!r:.80}")
    return value


def png(image: np.ndarray) -> str:
    """A uint8 image as a data URL."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _frame(frame: Frame) -> dict[str, Any]:
    asked = [{"name": name, "value": value, "boxes": boxes.tolist()} for name, value, boxes in frame.asked]
    return {**frame._asdict(), "image": png(frame.image), "boxes": np.asarray(frame.boxes).tolist(), "asked": asked}


def run(args: argparse.Namespace) -> int:
    """Serve the playground until Ctrl-C."""
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; {EXTRA}")
    with ExitStack() as stack:
        with clear_errors():
            listening = stack.enter_context(listen(args.host, args.port))  # before the weights, which take seconds
            seed = as_seed(args.seed or 0)
            decoding = decoding_from(args, Decoding())
            reward = make("ocr")
            given = {str(args.policy or "base"): Player(load_policy(args), reward)}
            for path in args.policies:
                given[str(path)] = Player(policy_at(path, device=args.device), reward)
        world = next(iter(given.values())).envs.world
        prompt = args.prompt if args.prompt is not None else world.sample(np.random.default_rng(seed)).prompt
        start = {"prompt": prompt, "policy": str(args.policy or "base"), "seed": seed, **vars(decoding)}
        app = create_app(Players(given, reward, args.device), start)
        host, number = listening.getsockname()[:2]
        print(
            f"The playground is at http://{f'[{host}]' if ':' in host else host}:{number} ; Ctrl-C ends it", flush=True
        )
        if not is_loopback(args.host):
            print(f"--host {args.host} lets in whoever reaches this machine: there is no password", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
    return 0
