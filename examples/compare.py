"""Train agents from the same base policy with the same budget and compare them on the same held-out prompts.

    python examples/compare.py                                  # minutes on two cores
    python examples/compare.py --preset full --out runs/full    # hours: three seeds, a larger budget
    python examples/compare.py --images 3200 --learning-rate 3e-5 --out runs/slower
    tensorboard --logdir runs                                   # scalars, pictures and texts while it trains

In --out: results.md (the table), results.json (settings, versions, every score), curves.png, before_after.png, and for
each run AGENT/seedK/ with TensorBoard events, progress.csv, policy.safetensors and result.json.

All agents start from the same weights, see the same training prompts in the same order, decode alike, and are
evaluated with the same noise on test prompts, whose words are in no training prompt.

Ctrl-C finishes the update, evaluates what has been learned so far, writes everything and exits with status 130; a
second Ctrl-C skips that evaluation. The same command with the same --out then trains the runs that are missing.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import report
from common import (
    AGENTS,
    INTERRUPTED,
    CurveEval,
    ImageBar,
    Interrupt,
    StopOnInterrupt,
    add_model_options,
    budget,
    clear_errors,
    load_policy,
    make_env,
    make_parser,
    require_at_least_one,
    write_json,
)
from report import Result
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from tqdm import tqdm

from agents import Decoding, StopAfter, evaluate, held_out_scenes
from agents.policies.base import Policy
from var_env import VARTextVectorEnv


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Preset:
    """What a comparison does. Every field is an option of the command line; `PRESETS` holds the defaults."""

    images: int = option(6400, "budget of each run in reward calls, one for each picture decoded")
    seconds: float = option(480.0, "cap on the training time of all runs together, shared out equally; 0 for none")
    learning_rate: float = option(5e-5, "AdamW's")
    group_size: int = option(8, "G, pictures for each prompt")
    prompts_per_update: int = option(8, "P, so that an update learns from P * G pictures")
    kl_coef: float = option(0.02, "weight of the KL to the base policy; 0 is without")
    temperature: float = option(1.0, "of the sampler while training")
    eval_temperature: float = option(1.0, "of the sampler in evaluations")
    test_prompts: int = option(256, "held-out prompts of the table, from the test split")
    val_prompts: int = option(64, "held-out prompts of the curves, from the val split")
    eval_every: int = option(20, "updates between two evaluations while training")

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        require_at_least_one(**{name: value for name, value in values.items() if isinstance(value, int)})
        for name, value in values.items():
            if not value >= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {value}")


PRESETS: dict[str, Preset] = {
    "quick": Preset(),
    "full": Preset(images=12_800, seconds=0.0, test_prompts=512, val_prompts=128, eval_every=50),
}
SEEDS = {"quick": [0], "full": [0, 1, 2]}
SCENE_SEED, NOISE_SEED = 0, 0  # of the held-out prompts, and of the sampler when it draws for them
NOT_COMPARED = ("seconds",)  # settings in which a finished run may differ from what is asked for


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--agents", nargs="+", choices=list(AGENTS), default=["grpo"], help="(default: grpo)")
    parser.add_argument("--preset", choices=list(PRESETS), default="quick", help="(default: %(default)s)")
    seeds = ", ".join(f"{' '.join(map(str, seeds))} in {name}" for name, seeds in SEEDS.items())
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help=f"one run each (default: {seeds})")
    parser.add_argument("--out", type=Path, help="folder for all that is written (default: runs/compare-PRESET)")
    add_model_options(parser)
    group = parser.add_argument_group("what to replace in the preset")
    for entry in dataclasses.fields(Preset):
        values = ", ".join(f"{getattr(preset, entry.name)} in {name}" for name, preset in PRESETS.items())
        group.add_argument(
            f"--{entry.name.replace('_', '-')}",
            type=type(entry.default),
            metavar=type(entry.default).__name__.upper(),
            help=f"{entry.metadata['help']} (default: {values})",
        )
    args = parser.parse_args(argv)
    given = {entry.name: getattr(args, entry.name) for entry in dataclasses.fields(Preset)}
    replaced = {name: value for name, value in given.items() if value is not None}
    with clear_errors():
        args.settings = dataclasses.replace(PRESETS[args.preset], **replaced)
    args.seeds = list(dict.fromkeys(args.seeds or SEEDS[args.preset]))
    args.agents = list(dict.fromkeys(args.agents))
    args.out = args.out or Path("runs") / f"compare-{args.preset}"
    return args


class Comparison:
    """The common ground of all runs: settings, base policy, environment, held-out prompts and decoding."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.settings: Preset = args.settings
        self.out: Path = args.out
        self.plan = [(agent, seed) for agent in args.agents for seed in args.seeds]
        self.base = load_policy(args)
        self.env: VARTextVectorEnv = make_env(self.base, self.settings.prompts_per_update)
        self.test = held_out_scenes(self.env.world, self.settings.test_prompts, SCENE_SEED, "test")
        self.val = held_out_scenes(self.env.world, self.settings.val_prompts, SCENE_SEED, "val")
        self.decoding = Decoding(temperature=self.settings.eval_temperature)
        self.config = dataclasses.asdict(self.settings) | {"base_weights": fingerprint(self.base)}

    def finished(self, agent: str, seed: int | None) -> Result | None:
        """The result of a run that needs no repeating. ``ValueError`` when it was made with other settings."""
        folder = report.run_folder(self.out, agent, seed)
        path = folder / "result.json"
        if not path.is_file():
            return None
        result: Result = json.loads(path.read_text())
        if not result["finished"]:
            return None
        for name, value in self.config.items():
            if name not in NOT_COMPARED and result["config"].get(name) != value:
                raise ValueError(
                    f"{folder} holds a run with {name}={result['config'].get(name)}, and now it is {value}: "
                    "choose another --out, or delete that folder"
                )
        return result

    def result(self, agent: str, seed: int | None, policy: Policy, **more: Any) -> Result:
        """Evaluate a policy on the test prompts, save the pictures and the result, and return it."""
        name = agent if seed is None else f"{agent}, seed {seed}"
        tqdm.write(f"{name}: evaluating on {len(self.test)} held-out prompts", file=sys.stderr)
        evaluation = evaluate(policy, self.env, self.test, self.decoding, NOISE_SEED)
        result = {"agent": agent, "seed": seed, "config": self.config, **more, **report.measure(evaluation)}
        folder = report.run_folder(self.out, agent, seed)
        report.save_strip(folder / "samples.png", evaluation)
        write_json(folder / "result.json", result)
        return result

    def train(self, name: str, seed: int, interrupt: Interrupt) -> list[Result]:
        """One run; its result, or none when it was interrupted before its first update."""
        settings, folder = self.settings, report.run_folder(self.out, name, seed)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt that was not finished
        agent = AGENTS[name](
            copy_of(self.base),
            self.env,
            group_size=settings.group_size,
            prompts_per_update=settings.prompts_per_update,
            learning_rate=settings.learning_rate,
            kl_coef=settings.kl_coef,
            decoding=Decoding(temperature=settings.temperature),
            seed=seed,
            device=self.base.device,
        )
        agent.set_logger(configure(str(folder), ["tensorboard", "csv"]))
        cap = settings.seconds / len(self.plan) or None
        callbacks: list[BaseCallback] = [
            CurveEval(settings.eval_every, self.val, "val", NOISE_SEED, self.decoding),
            StopAfter(images=settings.images, seconds=cap),
            StopOnInterrupt(interrupt),
            ImageBar(settings.images, f"{name}, seed {seed}"),
        ]
        agent.learn(settings.images * len(self.env.schedule), callbacks)
        agent.logger.close()
        if agent.n_updates == 0:
            return []
        trained: Any = agent.policy
        trained.save(folder / "policy.safetensors")
        if not interrupt.requested and agent.images_decoded < settings.images:
            tqdm.write(
                f"{name}, seed {seed}: stopped at {agent.images_decoded} images, after {cap:.0f} s of training "
                "(--seconds)",
                file=sys.stderr,
            )
        done = not interrupt.requested or agent.images_decoded >= settings.images
        return [self.result(name, seed, agent.policy, finished=done, budget=budget(agent))]


def copy_of(policy: Policy) -> Policy:
    """Weights of its own, the tokenizer shared."""
    return copy.deepcopy(policy, {id(policy.tokenizer): policy.tokenizer})


def fingerprint(policy: Policy) -> str:
    """A hash of the weights of policy and tokenizer."""
    digest = hashlib.sha256()
    for module in (policy, policy.tokenizer):
        for name, tensor in module.state_dict().items():
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of Python, the machine, and the packages that a result depends on."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in ("vartext", "torch", "numpy", "gymnasium", "stable-baselines3", "rapidocr", "onnxruntime"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with clear_errors():
        comparison = Comparison(args)
        base = comparison.finished("base", None)
        earlier = {run: comparison.finished(*run) for run in comparison.plan}
    results = [result for result in earlier.values() if result is not None]
    described = {
        **comparison.config,
        "agents": args.agents,
        "seeds": args.seeds,
        "policy": str(args.policy or "base"),
        "device": str(comparison.base.device),
        "versions": versions(),
    }
    failed = False
    notice = "Ctrl-C: finishing this update, then evaluating and writing; once more skips the evaluation"
    with Interrupt(notice) as interrupt:
        try:
            base = base or comparison.result("base", None, comparison.base, finished=True)
            for name, seed in comparison.plan:
                if interrupt.requested:
                    break
                if earlier[name, seed] is not None:
                    tqdm.write(f"{name}, seed {seed}: finished earlier, not trained again", file=sys.stderr)
                    continue
                try:
                    results += comparison.train(name, seed, interrupt)
                except RuntimeError as error:
                    failed = True
                    tqdm.write(f"{name}, seed {seed} failed and is left out: {error}", file=sys.stderr)
                report.write_report(args.out, described, base, results)
        except KeyboardInterrupt:
            tqdm.write("skipped the evaluation of this run", file=sys.stderr)
        if base is None:
            print("Interrupted before anything was measured.")
            return INTERRUPTED
        print(report.write_report(args.out, described, base, results))
        print(f"\n{args.out}: results.md, results.json, curves.png, before_after.png; tensorboard --logdir {args.out}")
        if interrupt.requested:
            print("Interrupted; the same command goes on with the runs that are missing.")
            return INTERRUPTED
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
