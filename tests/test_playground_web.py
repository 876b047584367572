"""The playground over HTTP: a session for each page, and what is refused, each with its message."""

import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import uvicorn
from conftest import Brightness
from tiny import tiny_policy
from toy_reward import until

from agents.experiments import play
from agents.experiments.playground import Limits, Player, Players
from agents.experiments.playground_web import create_app

PROMPT = 'A navy sign that says "KITE" in yellow letters'
DECODING = {"temperature": 1, "top_k": 0, "top_p": 1, "guidance": 1, "seed": 3}


class Slow(Brightness):
    """Waits until it may score."""

    def __init__(self):
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def score(self, images, scenes):
        self.begun.set()
        assert self.go_on.wait(60)
        return super().score(images, scenes)


@pytest.fixture
def slow():
    return Slow()


@pytest.fixture
def address(tokenizer, slow):
    """Of a playground of the tiny policy."""
    players = Players({"tiny": Player(tiny_policy(tokenizer), slow)}, slow)
    app = create_app(
        players, {"prompt": PROMPT, "policy": "tiny", **DECODING}, Limits(waiting=1, sessions=3, body_bytes=2000)
    )
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    slow.go_on.set()
    server.should_exit = True
    thread.join()


@pytest.fixture
def post(address):
    """Asks the playground: the answer, or the status and the message."""

    def post(path, body=None, **content):
        data = json.dumps(content).encode() if body is None else body
        try:
            with urlopen(Request(address + path, data if path else None), timeout=60) as answer:
                found = answer.read().decode()
                return json.loads(found) if path else found
        except HTTPError as error:
            return error.code, json.load(error)["detail"]

    return post


def begun(post, seed=3):
    """A page that has begun an image: what its requests hold."""
    page = {"session": post("api/session")["session"], "side": 0}
    assert post("api/draw", **page, prompt=PROMPT, policy="tiny", **{**DECODING, "seed": seed})["grids"] == [
        "1x1",
        "2x2",
        "4x4",
    ]
    return page


def test_the_page_needs_no_network(post):
    page = post("")
    assert "VARText playground" in page
    assert "http:" not in page and "https:" not in page


def test_an_image_grid_by_grid(post):
    assert post("api/session")["policies"][0] == "tiny"
    page = begun(post)
    frames = [post("api/step", **page) for _ in range(3)]
    assert [len(frame["tokens"]) for frame in frames] == [1, 4, 16]
    assert all(frame["image"].startswith("data:image/png;base64,") for frame in frames)
    assert frames[2]["boxes"] == [[0, 0, 8, 8]] and frames[2]["asked"][0]["name"] == "half 1"
    assert post("api/write", **page, band=1, tokens=[1, 2, 3, 4])["tokens"] == [1, 2, 3, 4]
    assert post("api/step", **page)["name"] == "4x4"
    assert post("api/back", **page, band=2, **DECODING) == {}
    assert post("api/step", **page)["name"] == "4x4"
    endings = post("api/suffixes", **page, band=1, count=2, **DECODING)
    assert len(endings["frames"]) == 2 and isinstance(endings["middle_return"], float)
    assert post("api/codes", **page, band=0)["count"] == 32


def test_two_browsers_at_once_have_images_of_their_own(post):
    def whole(seed):
        page = begun(post, seed)
        return [post("api/step", **page)["tokens"] for _ in range(3)]

    alone = [whole(seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as browsers:
        together = list(browsers.map(whole, (1, 2)))
    assert together == alone and alone[0] != alone[1]


def test_a_page_that_was_forgotten(post):
    page = begun(post)
    for _ in range(3):
        post("api/session")
    status, message = post("api/step", **page)
    assert status == 404 and "reload the page" in message


def test_too_many_wait(post, slow):
    pages = [begun(post) for _ in range(3)]
    slow.begun.clear()
    slow.go_on.clear()
    with ThreadPoolExecutor(3) as browsers:
        first = browsers.submit(post, "api/step", **pages[0])
        assert slow.begun.wait(60)
        rest = [browsers.submit(post, "api/step", **page) for page in pages[1:]]
        until(lambda: any(answer.done() for answer in rest))
        (refused,) = [answer.result() for answer in rest if answer.done()]
        slow.go_on.set()
        answers = [first.result(), *(answer.result() for answer in rest)]
    assert refused[0] == 429 and "1 requests wait already" in refused[1]
    assert sum(isinstance(answer, dict) for answer in answers) == 2


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("draw", {"prompt": "A sign"}, "names no word in double quotes"),
        ("draw", {"prompt": '"' + "A" * 300 + '"'}, "at most 192 fit"),
        ("draw", {"prompt": 7}, "prompt must be a text, got 7"),
        ("draw", {"policy": "../x.zip"}, "no policy '../x.zip' here"),
        ("draw", {"temperature": -1}, "temperature must be a number from 0 to 100"),
        ("draw", {"temperature": float("nan")}, "temperature must be a number"),
        ("draw", {"top_k": 1.5}, "top_k must be a whole number"),
        ("draw", {"top_p": 0}, "top_p must lie in"),
        ("draw", {"guidance": 1e9}, "guidance must be a number from 0 to 100"),
        ("draw", {"seed": None}, "seed must be a whole number"),
        ("draw", {"side": 2}, "side must be 0 or 1"),
        ("step", {"side": 1}, "nothing is drawn here yet"),
        ("suffixes", {"band": 0, "count": 99}, "from 1 to 8 images"),
        ("suffixes", {"band": 2, "count": 1}, "grid 3 cannot be drawn yet"),
        ("write", {"band": 0, "tokens": "x"}, "tokens must be a list"),
        ("back", {"band": True}, "band must be a whole number"),
    ],
)
def test_what_cannot_be_drawn(post, path, content, message):
    asked = {**begun(post), "prompt": PROMPT, "policy": "tiny", **DECODING, **content}
    status, told = post(f"api/{path}", **asked)
    assert status == 422 and message in told and "\n" not in told


def test_requests_of_another_form(post):
    assert post("api/step", b"{")[0] == 422
    assert post("api/step", b"[1]") == (422, "the request must be a JSON object, got [1]")
    assert post("api/step", b" " * 3000) == (413, "the request has more than 2000 bytes")
    assert post("api/step", session="none")[0] == 404


class TestCommand:
    def refused(self, *options):
        with pytest.raises(SystemExit) as end:
            play.main(["--web", "--device", "cpu", *map(str, options)])
        return str(end.value.code)

    def test_a_port_that_is_taken(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert self.refused("--port", port) == (
                f"error: cannot listen at --host 127.0.0.1 --port {port}: Address already in use; give another --port, "
                "or 0 for a free one"
            )

    def test_an_address_of_another_machine(self):
        assert "--host 192.0.2.1" in self.refused("--host", "192.0.2.1", "--port", 0)

    def test_a_policy_that_is_not_there(self):
        assert "no agent at none.zip" in self.refused("--port", 0, "--policies", "none.zip")

    def test_without_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "fastapi", None)
        assert "--web needs an extra: pip install 'vartext[web]'" in self.refused("--port", 0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--web", "--png", "a.png"], "--web writes no --png"),
            (["--policies", "plain"], "--policies is for --web"),
            (["--web", "--port", "70000"], "a port is a whole number of 0 to 65535"),
        ],
    )
    def test_options_that_do_not_go_together(self, options, message, capsys):
        with pytest.raises(SystemExit):
            play.parse(options)
        assert message in capsys.readouterr().err


def test_the_module_without_the_web_imports_none():
    code = "import sys, agents.experiments.playground; print({'fastapi', 'starlette', 'uvicorn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout == "set()\n"
