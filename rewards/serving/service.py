"""A reward over HTTP, for `rewards.make("http://localhost:8000")`. Needs the extra `service`.

    python -m rewards.service --reward ocr --port 8000
    python -m rewards.service --reward ocr --reward-kwargs '{"threads": 1}' --workers 4
    VARTEXT_REWARD_TOKEN=... python -m rewards.service --reward clip --workers 1 --host 0.0.0.0

POST /score takes images and scenes and returns scores, as `rewards.serving.wire` has it. GET /health says whether it
works, /version what it computes, /metrics counts for Prometheus. Requests that come within a few milliseconds of one
another are scored as one batch. With a token, all but /health ask for it, as "Authorization: Bearer ...".

What the service refuses it refuses with a status and a message: 422 what the reward would refuse, 413 too large, 429
too many requests at a time. SIGTERM or Ctrl-C ends it, once it has answered what it has accepted.
"""

import argparse
import asyncio
import importlib.metadata
import inspect
import json
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from rewards.base import check_images
from rewards.reason import reason
from rewards.serving.address import is_loopback, port
from rewards.serving.batching import Batcher, Limits, Metrics
from rewards.serving.client import TOKEN_VARIABLE
from rewards.serving.pool import RewardPool
from rewards.serving.wire import TooLarge, decode_request, encode_answer

if TYPE_CHECKING:
    from fastapi import FastAPI

PACKAGES = ("vartext", "numpy", "onnxruntime", "rapidocr", "paddleocr", "torch", "transformers")
BODY_SECONDS = 30  # for a client to send a request, so that one that stalls does not keep its place


def create_app(
    pool: RewardPool,
    limits: Limits | None = None,
    token: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> "FastAPI":
    """The service as an ASGI application. It starts the pool when it starts, and closes it when it ends.

    Args:
        pool: what scores.
        limits: `Limits`, the default ones by default.
        token: the bearer token that requests must carry; none by default.
        options: the reward's options, for /version.
    """
    from fastapi import Depends, FastAPI, HTTPException, Request, Response
    from fastapi.concurrency import run_in_threadpool
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    limits = limits or Limits()
    registry = CollectorRegistry()
    metrics = Metrics(pool, registry)
    batcher = Batcher(pool, limits, metrics)
    in_hand = 0

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(pool.start)
        yield
        await run_in_threadpool(pool.close)

    async def authorize(request: Request) -> None:
        if token is not None:
            given = request.headers.get("Authorization", "").encode()
            if not secrets.compare_digest(given, f"Bearer {token}".encode()):
                raise HTTPException(401, "wrong or no bearer token", {"WWW-Authenticate": "Bearer"})

    async def receive(request: Request) -> bytes:
        body, size = bytearray(), 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limits.max_body:
                body += chunk
        if size > limits.max_body:  # said at the end, since a client that is still sending may not listen
            raise TooLarge(f"the body has {size} bytes, this service takes {limits.max_body} at most")
        return bytes(body)

    async def answer(request: Request) -> bytes:
        try:
            body = await asyncio.wait_for(receive(request), BODY_SECONDS)
            images, scenes = await run_in_threadpool(decode_request, body, limits.max_images, limits.max_body)
            check_images(images)
            pool.check_scenes(scenes, len(images))
            output = await batcher.score(images, scenes)
        except asyncio.TimeoutError as error:
            raise HTTPException(408, f"the body did not come in {BODY_SECONDS} s") from error
        except TooLarge as error:
            raise HTTPException(413, reason(error)) from error
        except ValueError as error:
            raise HTTPException(422, reason(error)) from error
        except Exception as error:
            raise HTTPException(500, f"{type(error).__name__}: {reason(error)}") from error
        return await run_in_threadpool(encode_answer, output, images)

    async def score(request: Request) -> Response:
        """Score images for their scenes; the form of both is in `rewards.serving.wire`."""
        nonlocal in_hand
        start, status = time.perf_counter(), 500
        in_hand += 1
        metrics.in_hand.set(in_hand)
        try:
            if in_hand > limits.max_queue:
                wait = {"Retry-After": "1"}
                raise HTTPException(429, f"{limits.max_queue} requests are in hand, the most at a time", wait)
            response = Response(await answer(request), media_type="application/json")
            status = 200
            return response
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            in_hand -= 1
            metrics.in_hand.set(in_hand)
            metrics.requests.labels(status).inc()
            metrics.seconds.observe(time.perf_counter() - start)

    def health() -> dict[str, Any]:
        """Whether the service works, and the process ids of its workers."""
        return {"status": "ok", "workers": pool.pids}

    def version() -> dict[str, Any]:
        """What is computed here, and with what."""
        return {"reward": pool.name, "options": dict(options or {}), "models": pool.describe(), "packages": versions()}

    def measured() -> Response:
        """Counts for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app = FastAPI(title="VARText reward service", version=versions().get("vartext", "0"), lifespan=lifespan)
    guarded = [Depends(authorize)]
    app.post("/score", dependencies=guarded)(score)
    app.get("/health")(health)
    app.get("/version", dependencies=guarded)(version)
    app.get("/metrics", dependencies=guarded)(measured)
    return app


def versions() -> dict[str, str]:
    """Of the packages that can decide a score, those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m rewards.service", description=__doc__, formatter_class=formatter)
    limits = Limits()
    parser.add_argument("--reward", required=True, help="the name of the reward, as for rewards.make")
    parser.add_argument("--reward-kwargs", type=json_object, default={}, metavar="JSON", help="its options")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=port, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that score (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=60, help="seconds a worker may take for a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--token",
        default=os.environ.get(TOKEN_VARIABLE),
        help=f"the bearer token that requests must carry; better in the environment, as {TOKEN_VARIABLE}",
    )
    for name, default, text in (
        ("--max-batch", limits.max_batch, "images that a worker gets at a time"),
        ("--max-wait-ms", limits.max_wait * 1000, "milliseconds that a request waits for others to share its batch"),
        ("--max-images", limits.max_images, "images a request"),
        ("--max-body-mb", limits.max_body / 2**20, "MiB a request, and of pixels in PNG files"),
        ("--max-queue", limits.max_queue, "requests in hand"),
    ):
        parser.add_argument(name, type=type(default), default=default, help=f"{text} (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.token and not is_loopback(args.host):
        parser.error(
            f"--host {args.host} lets other machines in, and needs a bearer token: set {TOKEN_VARIABLE} or --token"
        )
    return args


def json_object(text: str) -> dict[str, Any]:
    """The options of a reward, for argparse."""
    try:
        value = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"""must be a JSON object, such as {{"threads": 1}}, got {text!r}""")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    try:
        import uvicorn

        pool = RewardPool(
            args.reward, args.reward_kwargs, args.workers, batch_size=args.max_batch, timeout=args.timeout
        )
        limits = Limits(
            max_body=int(args.max_body_mb * 2**20),
            max_images=args.max_images,
            max_queue=args.max_queue,
            max_batch=args.max_batch,
            max_wait=args.max_wait_ms / 1000,
        )
        defaults = inspect.signature(type(pool.reward)).parameters.values()
        options = {option.name: option.default for option in defaults if option.default is not option.empty}
        app = create_app(pool, limits, args.token or None, {**options, **args.reward_kwargs})
        pool.start()  # here, so that a reward that cannot load says so in one line
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; the service needs an extra: pip install 'vartext[service]'")
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"error: {reason(error)}")
    uvicorn.run(app, host=args.host, port=args.port, access_log=False)
