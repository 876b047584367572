"""What ``vartext bench`` measures, and how."""

from __future__ import annotations

import argparse
import copy
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import rapidocr
import torch
from stable_baselines3.common.logger import Logger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from agents import GRPO, VMR, Decoding, held_out_scenes
from agents.experiments.loading import load_policy, make_env
from agents.experiments.options import clear_errors
from agents.experiments.output import table, write_json
from agents.policies.base import Policy
from agents.policies.var_text import VARTextPolicy
from agents.rollout import collect, collect_in_parts, resized
from agents.sampling import draw
from rewards import HasWords, OCRReward, Reward, RewardOutput
from rewards.serving.pool import RewardPool
from rewards.text_metrics import word_accuracy
from var_env import ScaleSchedule, Tokenizer, VARTextVectorEnv
from var_env.scenes import render

CPU = torch.device("cpu")
GROWTH = ((1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 6, 8, 12), (1, 2, 3, 4, 6, 8, 12, 16), (1, 3, 6, 8, 12, 16, 20))  # sides
PHASES = ("sampling", "decode", "reward", "update")
AgentT = TypeVar("AgentT", bound=GRPO)


@dataclass
class Measured:
    """One line of the table."""

    name: str
    value: float
    unit: str
    target: str = ""
    met: bool | None = None  # None: there is no target


class FreeReward(Reward):
    """Costs nothing."""

    name = "free"

    def score(self, images: np.ndarray, scenes: Sequence[HasWords]) -> RewardOutput:
        return RewardOutput(np.zeros(len(images), np.float32))


class WaitingReward(Reward):
    """Waits for ``seconds`` an image, as for another machine that reads one by one, and costs next to nothing here."""

    name = "waiting"

    def __init__(self, seconds: float = 0.01) -> None:
        self.seconds = seconds

    def score(self, images: np.ndarray, scenes: Sequence[HasWords]) -> RewardOutput:
        time.sleep(self.seconds * len(images))
        return RewardOutput(images.mean((1, 2, 3), dtype=np.float32))  # not all equal: there is something to learn


class Alone(Reward):
    """A pool of which an agent does not know that it is one."""

    def __init__(self, pool: RewardPool) -> None:
        self.pool, self.name = pool, pool.name

    def score(self, images: np.ndarray, scenes: Sequence[HasWords]) -> RewardOutput:
        return self.pool(images, scenes)


class Bench:
    """The measurements, on batches of ``images`` in groups of ``group_size``."""

    def __init__(self, policy: Policy, images: int, group_size: int, repeats: int) -> None:
        self.policy, self.images, self.group_size, self.repeats = policy, images, group_size, repeats
        self.envs = make_env(policy, images // group_size, split="test")
        self.scenes = held_out_scenes(self.envs.world, images)

    def median(self, name: str, work: Callable[[], float]) -> float:
        """The median of what ``work`` returns, after one call that does not count."""
        work()
        return median(work() for _ in tqdm(range(self.repeats), name, leave=False))

    def seconds(self, name: str, work: Callable[[], Any]) -> float:
        """The median time of a call."""
        return self.median(name, lambda: self.clock(work))

    def clock(self, work: Callable[[], Any]) -> float:
        """The time of one call, a GPU's included."""
        synchronize(self.policy.device)
        start = time.perf_counter()
        work()
        synchronize(self.policy.device)
        return time.perf_counter() - start

    # The environment and rollouts ------------------------------------------------------------------------------------

    def environment(self) -> list[Measured]:
        base = self.envs
        envs = VARTextVectorEnv(self.images, world=base.world, tokenizer=base.tokenizer, reward=FreeReward())
        rng = np.random.default_rng(0)
        codes, depth = base.tokenizer.vocab_size, base.tokenizer.depth
        grids = [rng.integers(codes, size=(self.images, n, depth)) for n in base.schedule.sizes]

        def episode() -> None:
            envs.reset(options={"scenes": self.scenes})
            for grid in grids:
                envs.step(grid)

        seconds = self.seconds("environment", episode)
        return [Measured("environment steps/s", self.images * len(grids) / seconds, "1/s")]

    def rollout(self) -> list[Measured]:
        generator = torch.Generator(self.policy.device).manual_seed(0)

        def roll() -> None:
            collect(self.policy, self.envs, self.group_size, Decoding(), generator, seed=0)

        def own_share() -> float:
            device = self.policy.device
            with (
                stopwatch(VARTextVectorEnv, "reset", "advance", "decode", "fork", device=device) as inside,
                stopwatch(type(self.envs.tokenizer), "blank", "write", "decode", device=device) as tokenizer,
            ):
                total = self.clock(roll)
            return (inside[0] - tokenizer[0]) / total

        seconds = self.seconds("rollout", roll)
        share = 100 * self.median("environment's own share", own_share)
        return [
            Measured("rollout images/s", self.images / seconds, "1/s"),
            Measured("environment's own share of a rollout", share, "%", "<= 3", share <= 3),
        ]

    # Iterations ------------------------------------------------------------------------------------------------------

    def iteration(self) -> list[Measured]:
        grpo, vmr = self.agent(GRPO), self.agent(VMR, split="half", suffix_samples=2)
        seen: dict[GRPO, list[list[float]]] = {grpo: [], vmr: []}
        for _ in tqdm(range(self.repeats + 1), "iterations", leave=False):
            for agent, times in seen.items():  # in turns, so that a busy moment meets both
                agent._n_updates = 0  # VMR's first updates are of the prefix
                agent.iterate()
                times.append([agent.logger.name_to_value[f"time/{phase}"] for phase in PHASES])
        ours, prefix = (np.median(times[1:], axis=0) for times in seen.values())  # (phases,)
        predicted = (ours * self.prefix_work(vmr)).sum()
        shares = 100 * ours / ours.sum()
        return [
            Measured("update images/s", self.images / ours[-1], "1/s"),
            Measured("GRPO iteration", ours.sum(), "s"),
            *(Measured(f"share of {phase}", share, "%") for phase, share in zip(PHASES, shares, strict=True)),
            Measured("VMR prefix iteration", prefix.sum(), "s"),
            Measured("VMR prefix update, times faster than GRPO's", ours[-1] / prefix[-1], "x"),
            Measured(
                "VMR prefix iteration, against its token counts",
                prefix.sum() / predicted,
                "x",
                "<= 1.15",
                bool(prefix.sum() <= 1.15 * predicted),
            ),
        ]

    def agent(self, kind: type[AgentT], envs: VARTextVectorEnv | None = None, **options: Any) -> AgentT:
        """An agent that learns nothing, so that each repeat meets the same policy."""
        agent = kind(
            self.policy,
            envs or self.envs,
            group_size=self.group_size,
            prompts_per_update=self.images // self.group_size,
            learning_rate=0.0,
            image_interval=0,
            seed=0,
            device=self.policy.device,
            **options,
        )
        agent.set_logger(Logger(None, []))
        return agent

    def prefix_work(self, vmr: VMR) -> np.ndarray:
        """What a prefix iteration of VMR does in each of `PHASES`, as a multiple of a GRPO iteration's."""
        schedule, k = vmr.policy.schedule, vmr.suffix_samples
        prefix, whole = sum(schedule.sizes[: vmr.m]), schedule.total_tokens
        prompt = max(len(scene.prompt.encode()) + 1 for scene in self.scenes)  # the batch is padded to it
        return np.array([(prefix + k * (whole - prefix)) / whole, k, k, (prompt + prefix) / (prompt + whole)])

    # The reward ------------------------------------------------------------------------------------------------------

    def ocr(self) -> list[Measured]:
        images = np.stack([render(scene) for scene in self.scenes])
        assert isinstance(self.envs.reward, OCRReward)
        engine = self.envs.reward.engine
        default: Any = rapidocr.RapidOCR(params={"Global.log_level": "critical"})
        default(images[0][..., ::-1])  # opens the models
        ours = 1000 * self.seconds("OCR", lambda: engine.read(images)) / self.images
        texts: list[list[str]] = []

        def one_by_one() -> None:
            for image in tqdm(images, "RapidOCR's defaults", leave=False):
                texts.append(" ".join(default(image[..., ::-1]).txts or ()).split())

        theirs = 1000 * self.clock(one_by_one) / self.images
        read = [[word for line in lines for word in line.text.split()] for lines in engine.read(images)]
        equal = 100 * float(np.mean([mine == other for mine, other in zip(read, texts, strict=True)]))
        right, default_right = (
            float(np.mean([word_accuracy(scene.words, words) for scene, words in zip(self.scenes, found, strict=True)]))
            for found in (read, texts)
        )
        return [
            Measured("OCR ms/image", ours, "ms", "<= 15", ours <= 15),
            Measured("RapidOCR's defaults, ms/image", theirs, "ms"),
            Measured("OCR, times faster than the defaults", theirs / ours, "x", ">= 10", theirs / ours >= 10),
            Measured("OCR, images with the same text", equal, "%"),
            Measured("RapidOCR's defaults, words read right", 100 * default_right, "%"),
            Measured("OCR, words read right", 100 * right, "%", ">= the defaults'", right >= default_right),
        ]

    def overlap(self) -> list[Measured]:
        """Rollouts whose images two processes read: all at the end, or one part while the next is drawn."""
        prompts = self.images // self.group_size
        with RewardPool("ocr", {"threads": 1}, workers=2) as pool:
            envs = resized(self.envs, prompts, pool)

            def rollout(parts: int) -> Callable[[], Any]:
                more = (self.policy, envs, self.group_size, Decoding())
                return lambda: collect(*more, seed=0) if parts == 1 else collect_in_parts(*more, parts, 0)

            seconds = {parts: self.seconds(f"{parts} parts", rollout(parts)) for parts in (1, 2, 4)}
            loop = self.overlapped_iterations("read by 2 processes", pool)
        with RewardPool(WaitingReward(), workers=1, mode="thread") as pool:
            loop += self.overlapped_iterations("10 ms of waiting an image", pool)
        found = [Measured("rollout images/s, read by 2 processes", self.images / seconds[1], "1/s")]
        for parts in (2, 4):
            faster = seconds[1] / seconds[parts]
            found.append(Measured(f"overlapping OCR with sampling, {parts} parts, times faster", faster, "x"))
        return found + loop

    def overlapped_iterations(self, how: str, pool: RewardPool) -> list[Measured]:
        """GRPO iterations whose images a pool scores, one thing after the other and overlapped."""
        prompts = self.images // self.group_size
        agents = [self.agent(GRPO, resized(self.envs, prompts, Alone(pool)))]  # no pool to an agent, so it waits
        agents += [self.agent(GRPO, resized(self.envs, prompts, pool), overlap=parts) for parts in (1, 2)]
        times: list[list[float]] = [[] for _ in agents]
        for _ in tqdm(range(self.repeats + 1), f"iterations, {how}", leave=False):
            for agent, seen in zip(agents, times, strict=True):  # in turns, so that a busy moment meets all
                seen.append(self.clock(agent.iterate))
        serial, one, two = (median(seen[1:]) for seen in times)
        return [
            Measured(f"iteration images/s, {how}", self.images / serial, "1/s"),
            Measured(f"the reference while waiting, {how}, times faster", serial / one, "x"),
            Measured(f"overlapping the whole loop, {how}, times faster", serial / two, "x"),
        ]

    # The cache -------------------------------------------------------------------------------------------------------

    def cache(self) -> list[Measured]:
        if self.policy.schedule.is_raster:
            return []
        prompts = [scene.prompt for scene in self.scenes[: self.images // self.group_size]]
        exact = copy.deepcopy(self.policy).double()
        exact.tokenizer.double()
        exact.precision = "fp32"  # no autocast
        torch.set_default_dtype(torch.float64)
        try:
            pairs = zip(self.sample(exact, prompts, True), self.sample(exact, prompts, False), strict=True)
            if not all(torch.equal(cached, again) for cached, again in pairs):
                raise RuntimeError("cached and repeated sampling drew different tokens from the same noise")
        finally:
            torch.set_default_dtype(torch.float32)
        cached = self.seconds("cached sampling", lambda: self.sample(self.policy, prompts, True))
        again = self.seconds("whole prefix", lambda: self.sample(self.policy, prompts, False))
        return [
            Measured("sampling images/s, cached", self.images / cached, "1/s"),
            Measured("sampling images/s, whole prefix at every scale", self.images / again, "1/s"),
            Measured("cached sampling, times faster", again / cached, "x", ">= 3", again / cached >= 3),
        ]

    @torch.no_grad()
    def sample(self, policy: Policy, prompts: list[str], cached: bool) -> list[Tensor]:
        """The grids ``(B, n_t, 1)`` of a group for each prompt, from noise of a fixed seed."""
        generator = torch.Generator(policy.device).manual_seed(0)
        index = torch.arange(len(prompts), device=policy.device).repeat_interleave(self.group_size)
        cond = policy.encode_prompts(prompts)
        cache = policy.fork(policy.begin(cond), index) if cached else None
        cond, tokenizer = policy.take(cond, index), policy.tokenizer
        canvas = tokenizer.blank(len(index))
        grids: list[Tensor] = []
        for t in range(len(policy.schedule)):
            if cached:
                canvas = tokenizer.write(t - 1, canvas, grids[-1]) if t else canvas
                logits, cache = policy.step(cache, t, tokenizer.read(t, canvas), grids[-1] if t else None)
            else:
                logits = policy(cond, grids, range(t, t + 1))
            grids.append(draw(logits, None, Decoding(), generator).tokens)
        return grids

    # Growth ----------------------------------------------------------------------------------------------------------

    def growth(self) -> list[Measured]:
        """The time a token takes in an update and in sampling, as the tokens of an image grow."""
        if not (isinstance(self.policy, VARTextPolicy) and isinstance(self.policy.tokenizer, Tokenizer)):
            return []
        prompts = [scene.prompt for scene in self.scenes[:2]]
        config = {name: value for name, value in self.policy.tokenizer.config.items() if name not in ("grids", "patch")}
        works: dict[int, tuple[Callable[[], Any], ...]] = {}
        for sides in GROWTH:
            schedule = ScaleSchedule([(side, side) for side in sides], patch=8)
            tokenizer = Tokenizer(schedule, **config).eval().requires_grad_(False).to(self.policy.device)
            policy = VARTextPolicy(tokenizer, **self.policy.config).eval().to(self.policy.device)
            grids = self.sample(policy, prompts, True)
            works[schedule.total_tokens] = (
                partial(self.learn, policy, prompts, grids),
                partial(self.sample, policy, prompts, True),
            )
        seen: dict[int, list[list[float]]] = {tokens: [] for tokens in works}
        for _ in tqdm(range(self.repeats + 1), "growth", leave=False):
            for tokens, pair in works.items():  # in turns, so that a busy moment meets all
                seen[tokens].append([self.clock(work) / tokens for work in pair])
        first, *rest = (np.median(times[1:], axis=0) for times in seen.values())  # (2,)
        return [
            Measured(f"{name}, time a token, {tokens} against {min(works)} tokens", times[i] / first[i], "x")
            for i, name in enumerate(("update", "cached sampling"))
            for tokens, times in zip(list(works)[1:], rest, strict=True)
        ]

    def learn(self, policy: Policy, prompts: list[str], grids: list[Tensor]) -> None:
        """A teacher-forced forward and backward pass of a group for each prompt."""
        self.log_probs(policy, prompts, grids).mean().backward()
        policy.zero_grad()

    def log_probs(self, policy: Policy, prompts: list[str], grids: list[Tensor]) -> Tensor:
        """Those of the grids of a group for each prompt, ``(B, n, D)``."""
        index = torch.arange(len(prompts), device=policy.device).repeat_interleave(self.group_size)
        cond = policy.take(policy.encode_prompts(prompts), index)
        return policy.evaluate(cond, grids, range(len(policy.schedule)))[0]

    # The device ------------------------------------------------------------------------------------------------------

    def utilisation(self) -> list[Measured]:
        prompts = [scene.prompt for scene in self.scenes[: self.images // self.group_size]]
        grids = self.sample(self.policy, prompts, True)
        works: dict[str, Callable[[], Any]] = {
            "cached sampling": lambda: self.sample(self.policy, prompts, True),
            "forward pass": lambda: torch.no_grad()(self.log_probs)(self.policy, prompts, grids),
            "forward and backward pass": lambda: self.learn(self.policy, prompts, grids),
        }
        with Formats() as formats:
            works["forward pass"]()
        ((dtype, _),) = formats.count.most_common(1)
        peak = self.peak(dtype)
        found = [Measured(f"peak of the device in {str(dtype).removeprefix('torch.')}", peak / 1e12, "TFLOP/s")]
        for name, work in works.items():
            flop, seconds = operations(work), self.seconds(name, work)
            found += [
                Measured(f"{name}, an image", flop / self.images / 1e9, "GFLOP"),
                Measured(f"{name}, images/s", self.images / seconds, "1/s"),
                Measured(f"{name}, share of the device's peak", 100 * flop / seconds / peak, "%"),
            ]
        return found

    def peak(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second in the product of two large matrices."""
        side, times = (8192, 10) if self.policy.device.type == "cuda" else (1024, 3)
        matrix = torch.randn(side, side, device=self.policy.device).to(dtype)
        seconds = self.seconds("peak", lambda: [matrix @ matrix for _ in range(times)])
        return times * 2 * side**3 / seconds


class Formats(TorchDispatchMode):
    """Counts the weights of matrix products inside the ``with`` block by their number format."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.count[args[-1].dtype] += args[-1].numel()
        return func(*args, **(kwargs or {}))


def operations(work: Callable[[], Any]) -> int:
    """The floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def stopwatch(owner: type, *names: str, device: torch.device = CPU) -> Iterator[list[float]]:
    """The seconds spent in methods of a class inside the ``with`` block, as a list of one number.

    What a GPU still had to do before a call does not count, and what the call gives it does.
    """
    total = [0.0]

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            synchronize(device)
            start = time.perf_counter()
            try:
                return method(self, *args, **kwargs)
            finally:
                synchronize(device)
                total[0] += time.perf_counter() - start

        return call

    with ExitStack() as patches:
        for name in names:
            patches.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        yield total


def run(args: argparse.Namespace) -> int:
    with clear_errors():
        bench = Bench(load_policy(args), args.images, args.group_size, args.repeats)
    measured = [
        *bench.environment(),
        *bench.rollout(),
        *bench.iteration(),
        *bench.ocr(),
        *bench.overlap(),
        *bench.cache(),
        *bench.growth(),
        *bench.utilisation(),
    ]
    machine = {
        "device": str(bench.policy.device),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "images": args.images,
        "group_size": args.group_size,
        "repeats": args.repeats,
    }
    verdicts = {None: "", True: "PASS", False: "FAIL"}
    rows = [
        [m.name, f"{m.value:.4g} {m.unit}", f"{m.target} {m.unit}" if m.target else "", verdicts[m.met]]
        for m in measured
    ]
    print(table(["Measured", "Median", "Target", ""], rows))
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items()))
    if args.json:
        write_json(args.json, {"machine": machine, "measured": [asdict(m) for m in measured]})
    return 0
