"""Does the reward service stand? Clients that do not pause, workers that are killed, and every score checked.

    python examples/soak_service.py                          # two minutes
    python examples/soak_service.py --seconds 20 --kill-every 5 --out /tmp/soak

Starts `python -m rewards.service` and as many clients as asked for. Each sends batches of 1 to 16 images, the next as
soon as it has the answer, and compares scores and parts bit for bit with those of the reward in this process. Every
--kill-every seconds one of the service's workers is killed (SIGKILL), whatever it is at. Half of the images are
noisy, so that OCR is unsure of them.

Writes soak.json and soak.md to --out. Exit status 1 when a score differs or a request fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

import rewards
from agents.experiments.options import Parser, clear_errors
from agents.experiments.output import require_folder, table, write_json, write_text
from rewards.serving.client import RewardClient, ServiceError
from var_env.scenes import World, render

MAX_BATCH = 16  # images in a request


def noisy_images(count: int) -> tuple[np.ndarray, list[Any]]:
    """Rendered scenes, every other one with noise: uint8 ``(count, 64, 64, 3)``, and the scenes."""
    world, rng = World(split="test"), np.random.default_rng(0)
    scenes = [world.sample(rng) for _ in range(count)]
    images = np.stack([render(scene) for scene in scenes]).astype(np.float32)
    images[::2] += rng.normal(0, 40, images[::2].shape)
    return np.rint(images.clip(0, 255)).astype(np.uint8), scenes


@contextmanager
def service(reward: str, kwargs: Mapping[str, Any], workers: int) -> Iterator[str]:
    """The URL of a service in a process of its own, which is ended as an operator would."""
    command = [sys.executable, "-m", "rewards.service", "--reward", reward, "--reward-kwargs", json.dumps(kwargs)]
    paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        [*command, "--workers", str(workers), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    ) as process:
        try:
            assert process.stderr is not None
            log = []
            for line in process.stderr:
                log.append(line)
                found = re.search(r"running on (http://\S+)", line)
                if found:
                    break
            else:
                raise RuntimeError("the service did not start:\n" + "".join(log))
            threading.Thread(target=process.stderr.read, daemon=True).start()  # so that its log does not fill the pipe
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def get(url: str, path: str) -> str:
    with urlopen(url + path, timeout=30) as answer:
        return answer.read().decode()


def differ(values: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Where two arrays differ in any bit; NaN, not applicable, is equal to itself."""
    return (values != expected) & ~(np.isnan(values) & np.isnan(expected))


class Soak:
    """Clients, the killer of workers, and what they count.

    Args:
        url: of the service.
        reward: the reward in this process, which is right.
        seconds: how long.
        kill_every: seconds from one kill to the next.
    """

    def __init__(self, url: str, reward: rewards.Reward, seconds: float, kill_every: float) -> None:
        self.url, self.seconds, self.kill_every = url, seconds, kill_every
        self.images, self.scenes = noisy_images(64)
        self.expected = reward(self.images, self.scenes)
        self.latencies: list[float] = []  # seconds, one a request
        self.scored = self.mismatches = self.kills = 0
        self.failures: list[str] = []
        self.lock = threading.Lock()

    def run(self, clients: int) -> None:
        self.end = time.monotonic() + self.seconds
        with ThreadPoolExecutor(clients + 1) as threads:
            for future in [threads.submit(self.kill), *(threads.submit(self.client, seed) for seed in range(clients))]:
                future.result()

    def client(self, seed: int) -> None:
        """One client: batches without a pause, until the time is over."""
        rng, reward = random.Random(seed), RewardClient(self.url)
        while time.monotonic() < self.end:
            index = rng.sample(range(len(self.images)), rng.randint(1, MAX_BATCH))
            start = time.perf_counter()
            try:
                output = reward(self.images[index], [self.scenes[i] for i in index])
            except (ServiceError, ValueError) as error:
                with self.lock:
                    self.failures.append(str(error))
                continue
            seconds = time.perf_counter() - start
            wrong = differ(output.scores, self.expected.scores[index])
            for name, values in self.expected.parts.items():
                wrong |= differ(output.parts[name], values[index])
            with self.lock:
                self.latencies.append(seconds)
                self.scored += len(index)
                self.mismatches += int(wrong.sum())

    def kill(self) -> None:
        """Kill one worker every so often, the first and the last by turns."""
        start = time.monotonic()
        for wake in np.arange(start + self.kill_every, self.end, self.kill_every):
            time.sleep(max(wake - time.monotonic(), 0))
            workers = json.loads(get(self.url, "/health"))["workers"]
            if workers:  # there are none while the only one starts again
                os.kill(workers[-(self.kills % 2)], signal.SIGKILL)
                self.kills += 1

    def summary(self) -> dict[str, Any]:
        counts = {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in get(self.url, "/metrics").splitlines())
            if not name.startswith("#")
        }
        name = "vartext_reward"
        batches = counts[f"{name}_batch_images_count"]
        latencies = np.array(self.latencies or [float("nan")]) * 1000
        return {
            "requests": len(self.latencies),
            "images": self.scored,
            "images/s": round(self.scored / self.seconds, 1),
            "requests a batch": round(counts[f"{name}_batch_requests_sum"] / batches, 2) if batches else 0,
            "images a batch": round(counts[f"{name}_batch_images_sum"] / batches, 2) if batches else 0,
            "workers killed": self.kills,
            "workers replaced, their batch done again": int(counts[f"{name}_worker_restarts"]),
            "scores or parts that differ": self.mismatches,
            "failed requests": len(self.failures),
            "latency, median, ms": round(float(np.percentile(latencies, 50)), 1),
            "latency, 95 %, ms": round(float(np.percentile(latencies, 95)), 1),
            "latency, 99 %, ms": round(float(np.percentile(latencies, 99)), 1),
            "latency, longest, ms": round(float(latencies.max()), 1),
        }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="how long (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="at the same time (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="of the service (default: %(default)s)")
    parser.add_argument("--kill-every", type=float, default=20, metavar="S", help="seconds (default: %(default)s)")
    parser.add_argument("--reward", default="ocr", help="what is served (default: %(default)s)")
    parser.add_argument(
        "--reward-kwargs", type=json.loads, default={"threads": 1}, metavar="JSON", help="(default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="a folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.seconds, args.kill_every) <= 0 or min(args.clients, args.workers) < 1:
        parser.error("--seconds, --kill-every, --clients and --workers must be positive")
    with clear_errors():
        require_folder(args.out)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with clear_errors():
        reward = rewards.make(args.reward, **args.reward_kwargs)
        with service(args.reward, args.reward_kwargs, args.workers) as url:
            soak = Soak(url, reward, args.seconds, args.kill_every)
            soak.run(args.clients)
            result = soak.summary()
            version = json.loads(get(url, "/version"))
    setting = {
        "seconds": args.seconds,
        "clients": args.clients,
        "workers": args.workers,
        "kill_every": args.kill_every,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        **version,
    }
    text = table(["", "measured"], [[name, str(value)] for name, value in result.items()])
    print(text)
    for failure in sorted(set(soak.failures)):
        print(f"failed: {failure}", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "soak.md", text + "\n")
    write_json(args.out / "soak.json", {"setting": setting, "result": result, "failures": soak.failures[:100]})
    return int(bool(soak.mismatches or soak.failures or not soak.latencies))


if __name__ == "__main__":
    sys.exit(main())
