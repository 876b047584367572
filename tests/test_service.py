"""The reward service and its client: the reward's own scores through HTTP, or an error that says what is wrong."""

import base64
import http.client
import io
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import gymnasium as gym
import numpy as np
import pytest
import uvicorn
from PIL import Image
from toy_reward import Toy, assert_same, batch, until

import rewards
from rewards import service
from rewards.serving.batching import Limits
from rewards.serving.client import RewardClient, ServiceError
from rewards.serving.pool import RewardPool
from rewards.serving.wire import decode_answer, encode_answer, encode_request
from var_env.scenes import World, render

ROOT = Path(__file__).parent.parent


@contextmanager
def serving(workers=2, token=None, options=None, mode="thread", **limits):
    """The URL of a service of the toy reward, in this process."""
    pool = RewardPool(Toy(), workers=workers, mode=mode, batch_size=16)
    app = service.create_app(pool, Limits(**limits), token, options)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url():
    with serving(max_images=32, max_body=10**6, options={"size": 3}) as url:
        yield url


def request(url, path, body=None, **headers):
    """The status, the headers and the content of an answer."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("GET" if body is None else "POST", path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content


def metrics(url, **headers):
    lines = request(url, "/metrics", **headers)[2].decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def score(url, images, scenes, **more):
    """POST to /score what JSON can hold: its status and its detail."""
    body = json.dumps({"images": images, "scenes": scenes, **more}).encode()
    status, _, content = request(url, "/score", body)
    return status, json.loads(content).get("detail")


def raw(images):
    data = base64.b64encode(images.tobytes()).decode()
    return {"shape": list(images.shape), "dtype": str(images.dtype), "data": data}


def png(image, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, "PNG", **options)
    return base64.b64encode(file.getvalue()).decode()


WORDS = [{"words": ["RUN"]}]


# --- the service


@pytest.mark.parametrize("count", [1, 20, 70])
def test_the_scores_are_the_rewards_own(url, count):
    images, scenes = batch(count, "NOTHING")
    client = rewards.make(url, batch_size=32)
    assert client.name == "service"
    assert_same(client(images, scenes), Toy()(images, scenes))
    assert_same(pickle.loads(pickle.dumps(client))(images, scenes), Toy()(images, scenes))


def test_png_files(url):
    images, scenes = batch(3)
    body = {"images": {"png": [png(image) for image in images]}, "scenes": [vars(scene) for scene in scenes]}
    status, _, content = request(url, "/score", json.dumps(body).encode())
    assert status == 200
    assert_same(decode_answer(content, images), Toy()(images, scenes))


def test_a_palette_has_its_colours(url):
    file = Image.fromarray(batch(1)[0][0]).quantize(16)
    images, scenes = np.asarray(file.convert("RGB"))[None], batch(1)[1]
    body = {"images": {"png": [png(file)]}, "scenes": [vars(scene) for scene in scenes]}
    status, _, content = request(url, "/score", json.dumps(body).encode())
    assert status == 200
    assert_same(decode_answer(content, images), Toy()(images, scenes))


def test_an_environment_that_is_rewarded_by_a_service(url, tokenizer):
    env = gym.make("VARText-v0", reward=url, reward_kwargs={"timeout": 20}, tokenizer=tokenizer)
    env.reset(seed=1)
    env.action_space.seed(1)
    done = False
    while not done:
        _, score, done, _, info = env.step(env.action_space.sample())
    assert score == Toy()(info["image"][None], [env.unwrapped.scene]).scores[0]


def test_health_version_and_metrics(url):
    status, _, content = request(url, "/health")
    assert status == 200 and json.loads(content) == {"status": "ok", "workers": []}
    version = json.loads(request(url, "/version")[2])
    assert version["reward"] == "toy" and version["options"] == {"size": 3}
    assert version["packages"]["numpy"] == np.__version__ and "vartext" in version["packages"]
    before = metrics(url)
    RewardClient(url)(*batch(5))
    score(url, {}, [])
    after = metrics(url)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["vartext_reward_images_total"] == 5
    assert grown['vartext_reward_requests_total{status="200"}'] == 1
    assert grown['vartext_reward_requests_total{status="422"}'] == 1
    assert grown["vartext_reward_request_seconds_count"] == 2
    assert after["vartext_reward_worker_restarts"] == 0


def test_requests_of_several_clients_share_batches(tmp_path):
    go = tmp_path / "go"
    with serving(workers=1, max_batch=8) as url, ThreadPoolExecutor(7) as threads:
        held = threads.submit(RewardClient(url), *batch(1, f"WAIT:{go}"))
        until((tmp_path / "go.started").exists)  # the one worker is busy, so that the others gather
        batches = [batch(2, seed=seed) for seed in range(4)]
        batches += [batch(2, "W", "BAD"), batch(2, seed=9, size=32)]  # one spoils its batch, one has another size
        answers = [threads.submit(RewardClient(url), *images_and_scenes) for images_and_scenes in batches]
        until(lambda: metrics(url)["vartext_reward_requests_in_hand"] == 7)
        go.touch()
        held.result()
        for answer, (images, scenes) in zip(answers, batches, strict=True):
            if scenes[-1].words == ("BAD",):
                with pytest.raises(ValueError, match=r"^a word is BAD; use a good one$"):
                    answer.result()
            else:
                assert_same(answer.result(), Toy()(images, scenes))
        counts = metrics(url)
        assert counts['vartext_reward_batch_requests_bucket{le="2.0"}'] < counts["vartext_reward_batch_requests_count"]
        assert counts['vartext_reward_batch_images_bucket{le="8.0"}'] == counts["vartext_reward_batch_images_count"]
        assert counts["vartext_reward_images_total"] == 11


def test_order_under_concurrency(url):
    client = RewardClient(url)
    batches = [batch(1 + seed % 5, seed=seed) for seed in range(60)]
    with ThreadPoolExecutor(8) as threads:
        outputs = list(threads.map(lambda images_and_scenes: client(*images_and_scenes), batches))
    for output, (images, scenes) in zip(outputs, batches, strict=True):
        assert_same(output, Toy()(images, scenes))


IMAGES = batch(2)[0]


@pytest.mark.parametrize(
    "images",
    [
        IMAGES / np.float32(255),
        IMAGES.transpose(0, 3, 1, 2),
        np.concatenate([IMAGES, IMAGES[..., :1]], -1),
        IMAGES[0],
        IMAGES[:, :8],
        IMAGES.astype(np.int64),
    ],
    ids=["float", "CHW", "RGBA", "one", "small", "int64"],
)
def test_images_are_refused_as_the_reward_refuses_them(url, images):
    scenes = [SimpleNamespace(words=("RUN",))] * 2
    with pytest.raises(ValueError) as expected:
        Toy()(images, scenes)
    assert score(url, raw(images), WORDS * 2) == (422, str(expected.value))
    with pytest.raises(ValueError) as error:
        RewardClient(url)(images, scenes)
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize(
    ("images", "scenes", "message"),
    [
        (raw(IMAGES[:0]), [], "the batch is empty"),
        ({"png": []}, [], "the batch is empty"),
        (raw(IMAGES), WORDS, "got 1 scenes for 2 images"),
        (raw(IMAGES), [{"words": ["RUN"]}, {"prompt": "RUN"}], r"scene 1 \(namespace\(prompt='RUN'\)\) needs `.words`"),
        (raw(IMAGES), [{"words": []}, *WORDS], "scene 0 has no target words"),
        (raw(IMAGES), ["RUN", "RUN"], '"scenes" must be a list of JSON objects'),
        ({"png": [png(IMAGES[0]), png(IMAGES[1, :, :8])]}, WORDS * 2, "image 0 is 16 x 16 x 3, image 1 is 16 x 8 x 3"),
        ({"png": [png(np.zeros((16, 16, 4), np.uint8))]}, WORDS, r"got \(1, 16, 16, 4\); drop alpha"),
        ({"png": [png(IMAGES[0, :, :, 0])]}, WORDS, r"got \(1, 16, 16, 1\); repeat the grey channel"),
        ({"png": [png(Image.new("P", (16, 16)), transparency=0)]}, WORDS, r"got \(1, 16, 16, 4\); drop alpha"),
        ({"png": [png(IMAGES[0])[:80]]}, WORDS, "image 0 is no readable PNG file"),
        ({"png": ["!"]}, WORDS, "image 0 is not base64"),
        ({"png": [3]}, WORDS, "image 0 is not base64"),
        (raw(IMAGES) | {"data": png(IMAGES[0])}, WORDS * 2, r'"data" holds \d+ bytes, not the 1536 of shape \[2, 16'),
        (raw(IMAGES) | {"shape": [2, -1]}, WORDS, '"shape" must be a list of whole numbers'),
        (raw(IMAGES) | {"dtype": "O"}, WORDS * 2, '"dtype" must be "uint8", got \'O\''),
        ([1], WORDS, '"images" must be {"shape"'),
    ],
)
def test_requests_of_another_form(url, images, scenes, message):
    status, detail = score(url, images, scenes)
    assert status == 422 and re.search(message, detail), detail


@pytest.mark.parametrize(("body", "message"), [(b"{", "the body is no JSON"), (b"[]", 'with "images" and "scenes"')])
def test_a_body_of_another_form(url, body, message):
    status, _, content = request(url, "/score", body)
    assert status == 422 and message in json.loads(content)["detail"]


def test_a_score_that_is_not_finite_is_an_error(url):
    with pytest.raises(ValueError, match=r"the score of image 1 is nan \(1 of 2 not finite\)"):
        RewardClient(url)(*batch(2, "W", "NAN"))


def test_what_is_too_large(url):
    with pytest.raises(ServiceError, match="status 413: the batch has 33 images, this service takes 32 at most"):
        RewardClient(url)(*batch(33))
    assert score(url, {"png": ["x"] * 33}, WORDS * 33)[0] == 413
    with pytest.raises(ServiceError, match=r"status 413: the body has \d+ bytes, this service takes 1000000 at most"):
        RewardClient(url)(*batch(1, size=600))
    blank = png(np.zeros((600, 600, 3), np.uint8))
    assert len(blank) < 10**4
    assert score(url, {"png": [blank]}, WORDS) == (
        413,
        "the images hold more than 1000000 bytes of pixels, the most this service takes",
    )


def test_a_full_queue(tmp_path):
    go = tmp_path / "go"
    with serving(max_queue=1) as url, ThreadPoolExecutor(2) as threads:
        held = threads.submit(RewardClient(url), *batch(1, f"WAIT:{go}"))
        until((tmp_path / "go.started").exists)
        status, headers, _ = request(url, "/score", b"")
        assert status == 429 and headers["Retry-After"] == "1"
        with pytest.raises(ServiceError, match=r"failed 1 times, at last: status 429, 1 requests are in hand"):
            RewardClient(url, retries=0)(*batch(1))
        with pytest.raises(ServiceError, match=r"gave no answer within 0.5 s; the last of 1 tries: status 429"):
            RewardClient(url, timeout=0.5)(*batch(1))
        patient = threads.submit(RewardClient(url, retries=20), *batch(3))
        until(lambda: metrics(url)['vartext_reward_requests_total{status="429"}'] >= 4)
        go.touch()
        held.result()
        assert_same(patient.result(), Toy()(*batch(3)))


def test_a_bearer_token(monkeypatch):
    images, scenes = batch(2)
    with serving(token="secret") as url:
        for path in ("/version", "/metrics"):
            assert request(url, path)[0] == 401
            assert request(url, path, Authorization="Bearer secret")[0] == 200
        assert request(url, "/health")[0] == 200
        for token in (None, "wrong", "secré"):
            with pytest.raises(ServiceError, match="status 401: wrong or no bearer token"):
                RewardClient(url, token=token)(images, scenes)
        assert_same(RewardClient(url, token="secret")(images, scenes), Toy()(images, scenes))
        monkeypatch.setenv("VARTEXT_REWARD_TOKEN", "secret")
        assert_same(RewardClient(url)(images, scenes), Toy()(images, scenes))


def test_other_machines_need_a_token(monkeypatch, capsys):
    monkeypatch.delenv("VARTEXT_REWARD_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "10.0.0.7", "node07"):
        with pytest.raises(SystemExit):
            service.parse(["--reward", "ocr", "--host", host])
        assert f"--host {host} lets other machines in, and needs a bearer token" in capsys.readouterr().err
    for host in ("127.0.0.1", "::1", "localhost"):
        assert service.parse(["--reward", "ocr", "--host", host]).token is None
    monkeypatch.setenv("VARTEXT_REWARD_TOKEN", "secret")
    assert service.parse(["--reward", "ocr", "--host", "0.0.0.0"]).token == "secret"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--port", "99999", "a port is a whole number of 0 to 65535, got '99999'"),
        ("--port", "-1", "a port is a whole number of 0 to 65535, got '-1'"),
        ("--reward-kwargs", "{threads: 1}", "'{threads: 1}' is no JSON"),
        ("--reward-kwargs", "[1]", "must be a JSON object"),
    ],
)
def test_malformed_options(option, value, message, capsys):
    with pytest.raises(SystemExit):
        service.parse(["--reward", "ocr", f"{option}={value}"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reward", "nosuch"], "error: unknown reward 'nosuch'; available: ocr"),
        (["--reward", "ocr", "--reward-kwargs", '{"x": 1}'], "error: unknown option 'x' of reward 'ocr'"),
        (["--reward", "ocr", "--workers", "0"], "error: workers must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_options_end_the_service_in_one_line(options, message):
    with pytest.raises(SystemExit, match=message):
        service.main(options)


# --- the service as a process of its own


@contextmanager
def process(command, **environment):
    """A process that serves, and its URL."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": paths, **environment}
    with subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=env) as server:
        try:
            log = ""
            for line in server.stderr:
                log += line
                found = re.search(r"running on (http://127.0.0.1:\d+)", line)
                if found:
                    break
            assert found, log
            threading.Thread(target=server.stderr.read, daemon=True).start()
            yield server, found[1]
        finally:
            server.kill()


def test_ocr_over_http_with_a_worker_killed():
    command = ["-m", "rewards.service", "--reward", "ocr", "--reward-kwargs", '{"threads": 1}', "--port", "0"]
    world, rng = World(), np.random.default_rng(0)
    scenes = [world.sample(rng) for _ in range(6)]
    images = np.stack([render(scene) for scene in scenes])
    expected = rewards.make("ocr")(images, scenes)
    with process([*command, "--workers", "1"]) as (server, url):
        client = rewards.make(url)
        assert_same(client(images, scenes), expected)
        pid = json.loads(urlopen(f"{url}/health").read())["workers"][0]
        os.kill(pid, signal.SIGKILL)
        assert_same(client(images, scenes), expected)
        assert json.loads(urlopen(f"{url}/health").read())["workers"] != [pid]
        assert metrics(url)["vartext_reward_worker_restarts"] == 1
        version = json.loads(urlopen(f"{url}/version").read())
        assert version["models"]["rec"] == "PP-OCRv6_rec_small.onnx"
        assert version["options"]["penalty_weight"] == 0.6 and version["options"]["threads"] == 1
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) in (0, -signal.SIGTERM)


def test_the_soak_script(tmp_path, capsys):
    soak = import_module("examples.soak_service")
    options = ["--seconds", "2", "--clients", "3", "--workers", "1", "--kill-every", "1.2", "--out", str(tmp_path)]
    assert soak.main(options) == 0
    written = json.loads((tmp_path / "soak.json").read_text())
    assert written["result"]["workers killed"] == 1 and written["result"]["requests"] > 0
    assert written["result"]["scores or parts that differ"] == written["result"]["failed requests"] == 0
    assert written["setting"]["reward"] == "ocr"
    assert (tmp_path / "soak.md").read_text() in capsys.readouterr().out
    assert soak.differ(np.array([1, 2, np.nan]), np.array([1, 2.5, np.nan])).tolist() == [False, True, False]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_that_is_told_to_end_answers_what_it_has_accepted(tmp_path, number):
    go, wait = tmp_path / "go", batch(2, f"WAIT:{tmp_path / 'go'}")
    code = (
        "import uvicorn; from rewards.serving.pool import RewardPool; from rewards.service import create_app\n"
        "from toy_reward import Toy\n"
        "uvicorn.run(create_app(RewardPool(Toy(), mode='thread', workers=1)), port=0)"
    )
    with process(["-c", code]) as (server, url), ThreadPoolExecutor(2) as threads:
        scored = threads.submit(RewardClient(url), *wait)
        until((tmp_path / "go.started").exists)
        queued = threads.submit(RewardClient(url), *batch(3))
        until(lambda: metrics(url)["vartext_reward_requests_in_hand"] == 2)
        server.send_signal(number)
        until(lambda: refused(url))
        with pytest.raises(ServiceError, match="failed 2 times, at last: ConnectionRefusedError"):
            RewardClient(url, retries=1)(*batch(1))
        go.touch()
        assert_same(scored.result(), Toy()(*wait))
        assert_same(queued.result(), Toy()(*batch(3)))
        assert server.wait(timeout=60) in (0, -number, 130)


def refused(url):
    host, _, port = url.removeprefix("http://").partition(":")
    try:
        socket.create_connection((host, int(port))).close()
    except OSError:
        return True
    return False


# --- the client and a service that errs


@contextmanager
def answering(*answers):
    """The URL of a server that gives these answers, the last one again and again: a function of its handler each."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            (left.pop(0) if len(left) > 1 else left[0])(self)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def reply(body, status=200, length=None, **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": length or len(body), **headers}.items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


IMAGES, SCENES = batch(3, "A", "BB", "CCC")
RIGHT = json.loads(encode_answer(Toy()(IMAGES, SCENES), IMAGES))


def changed(**fields):
    return reply(json.dumps(RIGHT | fields).encode())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (changed(scores=RIGHT["scores"][:2]), "wrong answer: it holds 2 scores for 3 images"),
        (changed(scores=[]), "it holds no scores for 3 images"),
        (changed(scores=[1, None, 2]), "it holds null for a score"),
        (changed(scores=[1, float("nan"), 2]), "it holds NaN"),
        (changed(scores=[1, float("inf"), 2]), "it holds Infinity"),
        (changed(scores=[1, 1e39, 2]), "its scores of image 1 is 1e[+]39, not a finite number"),
        (changed(scores=[1, "2", 3]), "its scores of image 1 is '2', not a finite number"),
        (changed(scores=[1, True, 3]), "its scores of image 1 is True, not a finite number"),
        (changed(crc32=RIGHT["crc32"][::-1]), "its scores belong to other images, or to these in another order"),
        (changed(parts={"first": [1]}), "it holds 1 part 'first' for 3 images"),
        (changed(parts={"first": [1, 2, "x"]}), "its first of image 2 is 'x'"),
        (changed(parts=[1]), r"its parts are \[1\], not an object"),
        (changed(words=[["A"], ["B"], "C"]), "its words of an image are 'C', not a list of strings"),
        (changed(confidences=[[0.5], [], [1]]), r"its confidences of the words \['BB'\] are \[\]"),
        (changed(confidences=[[0.5], [2], [1]]), r"its confidences \[2\] do not lie in \[0, 1\]"),
        (changed(regions=[[], [[1, 2, 3]], []]), r"its regions of an image are \[\[1, 2, 3\]\]"),
        (changed(components=[[], [["a", [0], None, None]], []]), r"its component \['a', \[0\], None, None\] is not"),
        (changed(components=[[], 1, []]), "its components of an image are 1, not a list"),
        (changed(applicable=[1, 1, 1]), "are not all true or false"),
        (reply(b'{"scores": [1, 2, 3]}'), "it has no 'parts'"),
        (reply(b"[]"), "it has no 'scores'"),
        (reply(b"<html>"), "it is no JSON"),
        (reply(b'{"scores": [1, 2', length=1000), "broke off in the middle of its answer: IncompleteRead"),
        (reply(b'{"detail": "no such page"}', 404), "refused with status 404: no such page"),
        (reply(b"oops", 500), "refused with status 500: oops"),
        (reply(b"", 302, Location="http://localhost:1"), "refused with status 302: no message"),
        (lambda handler: handler.wfile.write(b"SSH-2.0\r\n"), "cannot be reached: BadStatusLine: SSH-2.0"),
    ],
)
def test_a_wrong_or_a_half_answer_is_an_error(answer, message):
    with answering(answer) as url, pytest.raises(ServiceError, match=f"^{url} .*{message}"):
        RewardClient(url)(IMAGES, SCENES)


def test_what_can_be_tried_again_is():
    cut = lambda handler: handler.connection.close()  # noqa: E731
    busy, bad = reply(b"", 503), reply(b"later", 502, Retry_After=0)
    with answering(busy, cut, bad, changed()) as url:
        assert_same(RewardClient(url)(IMAGES, SCENES), Toy()(IMAGES, SCENES))
    with answering(busy) as url, pytest.raises(ServiceError, match=f"^{url} failed 3 times, at last: status 503"):
        RewardClient(url, retries=2)(IMAGES, SCENES)


def test_a_late_answer_is_an_error():
    end = threading.Event()

    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        while not end.wait(0.05):
            handler.wfile.write(b" ")

    def failure(answer):
        with answering(answer) as url:
            try:
                with pytest.raises(ServiceError) as error:
                    RewardClient(url, timeout=1)(IMAGES, SCENES)
                return str(error.value).removeprefix(url)
            finally:
                end.set()  # the server waits for its answers

    assert failure(lambda handler: end.wait(60)) == " gave no answer within 1 s; raise timeout, or look there"
    end.clear()
    assert failure(drip).startswith(" gave no answer within 1 s while its answer came in; raise timeout")


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(ServiceError, match=rf"^http://127.0.0.1:{port}/ failed 2 times, .*refused"):
        RewardClient(f"http://127.0.0.1:{port}/", retries=1)(IMAGES, SCENES)
    with pytest.raises(ServiceError, match=r"^http://no.such.host.invalid cannot be reached: gaierror"):
        RewardClient("http://no.such.host.invalid")(IMAGES, SCENES)


def test_the_clients_options():
    for url in ("localhost:8000", "ftp://localhost", "http://", "http://localhost?x=1"):
        with pytest.raises(ValueError, match="url must be like http://localhost:8000"):
            RewardClient(url)
    with pytest.raises(ValueError, match="timeout must be a positive number"):
        rewards.make("http://localhost", timeout=0)
    with pytest.raises(ValueError, match="retries must be at least 0"):
        rewards.make("http://localhost", retries=-1)
    with pytest.raises(ValueError, match="unknown option 'threads' of reward 'service'"):
        rewards.make("http://localhost", threads=1)


def test_scenes_that_cannot_be_sent():
    with pytest.raises(ValueError, match="got 2 scenes for 3 images"):
        RewardClient("http://localhost")(IMAGES, SCENES[:2])
    with pytest.raises(ValueError, match=r"scene 0 .* cannot be sent as JSON: .*set"):
        encode_request(IMAGES, [SimpleNamespace(words={"A"})])


def test_a_scene_keeps_its_fields():
    scene = World().sample(np.random.default_rng(3))
    sent = json.loads(encode_request(IMAGES[:1], [scene]))["scenes"][0]
    assert sent["prompt"] == scene.prompt and tuple(sent["words"]) == scene.words and sent["size"] == 64
