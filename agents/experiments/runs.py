"""Runs on common ground, for `vartext compare` and its like: what all have in common, one run, and a plan of many.

A run is a `Cell`: an agent, its settings and a seed. Its folder, OUT/LABEL/seedK, holds all that it writes, and when
result.json there says that it is finished, it is not trained again. One that was interrupted or killed goes on from its
last checkpoint, exactly, unless its settings are others now. The runs of a plan are trained one after another, or with
``--ray`` many at a time, see ray_runs.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from agents import (
    GRPO,
    Agent,
    Checkpoints,
    ConflictProbe,
    Decoding,
    StopAfter,
    Wrapper,
    evaluate,
    held_out_scenes,
    recipes,
)
from agents.callbacks import CheckpointEvery, Interrupt, StopOnSignal
from agents.common.processes import current
from agents.experiments import ray_runs, report
from agents.experiments.agent_options import settings_of
from agents.experiments.callbacks import CurveEval, ImageBar, budget
from agents.experiments.cells import BASE, Cell, Outcome, Result
from agents.experiments.loading import copy_of, load_policy, make_env
from agents.experiments.options import (
    INTERRUPTED,
    clear_errors,
)
from agents.experiments.output import write_json
from agents.experiments.run_options import Preset
from agents.logs import open_logger
from agents.policies.base import Policy
from var_env import VARTextVectorEnv

SCENE_SEED, NOISE_SEED = 0, 0  # of the held-out prompts, and of the sampler when it draws for them
NOT_COMPARED = ("seconds",)  # settings in which a finished run may differ from what is asked for


class Comparison:
    """The common ground: settings, base policy, environment, held-out prompts and decoding."""

    def __init__(self, args: argparse.Namespace) -> None:
        if current().count > 1:
            raise ValueError(
                "a comparison is one process: many runs at a time take --ray, one run on several GPUs `vartext train`"
            )
        self.args = args
        self.settings: Preset = args.settings
        self.out: Path = args.out
        self.save_every: int = args.save_every
        self.base = load_policy(args)
        self.env: VARTextVectorEnv = make_env(
            self.base,
            self.settings.prompts_per_update,
            prompts=args.prompts_from,
            reward=args.reward,
            reward_kwargs=args.reward_kwargs,
        )
        self.test = held_out_scenes(self.env.world, self.settings.test_prompts, SCENE_SEED, "test")
        self.val = held_out_scenes(self.env.world, self.settings.val_prompts, SCENE_SEED, "val")
        self.decoding = Decoding(temperature=self.settings.eval_temperature)
        self.config = dataclasses.asdict(self.settings) | {"base_weights": fingerprint(self.base)}
        if args.reward != "ocr" or args.reward_kwargs:
            self.config |= {"reward": args.reward, "reward_kwargs": args.reward_kwargs}
        if args.prompts_from:
            self.config |= {"prompts_from": args.prompts_from}
        self.method: dict[str, Any] = args.method
        self.described = self.config | {
            "seeds": args.seeds,
            "policy": str(args.policy or "base"),
            "device": str(self.base.device),
            "versions": versions(),
            "models_of_the_reward": self.env.reward.describe(),
        }

    def cell(self, recipe: str, seed: int, **changes: Any) -> Cell:
        """A run of a recipe, its label, with some of the method's settings changed."""
        method = settings_of(recipe, self.method | changes)
        if method.get("split", "auto") != "auto":
            method["split"] = self.base.schedule.middle_step(method["split"])
        return Cell(recipe, recipe, seed, method)

    def finished(self, cell: Cell) -> Result | None:
        """The result of a run that needs no repeating. ``ValueError`` when it was made with other settings."""
        folder = report.run_folder(self.out, cell.label, cell.seed)
        path = folder / "result.json"
        if not path.is_file():
            return None
        result: Result = json.loads(path.read_text())
        if not result["finished"]:
            return None
        for name, value in json.loads(json.dumps(self.config | cell.method)).items():  # tuples as the file has them
            if name not in NOT_COMPARED and result["config"].get(name) != value:
                raise ValueError(
                    f"{folder} holds a run with {name}={result['config'].get(name)}, and now it is {value}: "
                    "choose another --out, or delete that folder"
                )
        return result

    def result(self, cell: Cell, policy: Policy, best_of: int = 1, **more: Any) -> Result:
        """Evaluate a policy on the test prompts, save the pictures and the result, and return it."""
        tqdm.write(f"{cell}: evaluating on {len(self.test)} held-out prompts", file=sys.stderr)
        evaluation = evaluate(policy, self.env, self.test, self.decoding, NOISE_SEED, best_of=best_of)
        result = {
            "agent": cell.label,
            "seed": cell.seed,
            "config": self.config | cell.method,
            "diagnostics": policy.diagnostics(),
            **more,
            **report.measure(evaluation),
        }
        folder = report.run_folder(self.out, cell.label, cell.seed)
        report.save_strip(folder / "samples.png", evaluation)
        write_json(folder / "result.json", result)
        return result

    def agent(self, cell: Cell) -> Agent | Wrapper:
        """A new agent on a copy of the base policy."""
        available = recipes.options_in(cell.recipe)
        common = {name: value for name, value in dataclasses.asdict(self.settings).items() if name in available}
        return recipes.make(
            cell.recipe,
            self.env,
            copy_of(self.base),
            **{
                **common,
                **cell.method,
                "decoding": Decoding(temperature=self.settings.temperature),
                "seed": cell.seed,
                "device": self.base.device,
            },
        )

    def train(self, cell: Cell, interrupt: Interrupt) -> Result | None:
        """One run; ``None`` when it was interrupted before its first update."""
        settings, folder = self.settings, report.run_folder(self.out, cell.label, cell.seed)
        cap = settings.seconds or None
        saves = CheckpointEvery(folder / "checkpoints", self.save_every)
        agent, step = self.start(cell, folder, saves.checkpoints)
        agent.set_logger(open_logger(folder, ["tensorboard", "csv"], step))
        callbacks: list[BaseCallback] = [
            saves,
            CurveEval(settings.eval_every, self.val, "val", NOISE_SEED, self.decoding),
            StopAfter(images=settings.images, seconds=cap),
            StopOnSignal(interrupt),
            ImageBar(settings.images, str(cell)),
        ]
        if isinstance(agent.unwrapped, GRPO):
            callbacks.insert(2, ConflictProbe(4 * settings.eval_every))  # costs as much as two or three updates
        steps = max(agent.timesteps(settings.images) - agent.num_timesteps, 0)
        agent.learn(steps, callbacks, reset_num_timesteps=step is None)
        agent.logger.close()
        if agent.n_updates == 0 and interrupt.requested:
            return None
        agent.best_policy.save(folder / "policy.safetensors")
        short = agent.images_decoded < settings.images
        if cap is not None and agent.seconds >= cap and short:
            tqdm.write(
                f"{cell}: stopped at {agent.images_decoded} images, after {cap:.0f} s of training (--seconds)",
                file=sys.stderr,
            )
        finished = not (short and interrupt.requested)
        result = self.result(cell, agent.best_policy, agent.best_of, finished=finished, budget=budget(agent))
        if finished:
            shutil.rmtree(saves.checkpoints.folder)
        return result

    def start(self, cell: Cell, folder: Path, checkpoints: Checkpoints) -> tuple[Agent | Wrapper, int | None]:
        """The agent of an earlier attempt at the run, with the step that it has come to, or a new one and ``None``."""
        asked = json.loads(json.dumps(self.config | cell.method))  # tuples as the file has them
        file = folder / "config.json"
        checkpoints.tidy()
        if checkpoints.paths() and file.is_file() and json.loads(file.read_text()) == asked:
            agent = checkpoints.load(self.env, self.base.device)
            tqdm.write(f"{cell}: goes on after update {agent.n_updates}", file=sys.stderr)
            return agent, agent.num_timesteps
        shutil.rmtree(folder, ignore_errors=True)
        write_json(file, asked)
        return self.agent(cell), None

    def run(self, plan: Sequence[Cell], write: Callable[[Result, list[Result]], str]) -> int:
        """Train what is not finished, write the report after each run, and print it in the end; the exit status.

        The runs are trained one after another, or with ``--ray`` as `ray_runs.RayRuns` does. ``write`` gets the result
        of the base policy and those of the runs so far, in the order of the plan.
        """
        train_all: Callable[[Iterable[Cell], Interrupt], Iterator[tuple[Cell, Outcome]]] = self.one_after_another
        with clear_errors():
            base = self.finished(BASE)
            results = {cell: self.finished(cell) for cell in plan}
            for cell in {cell.label: cell for cell in plan}.values():
                self.agent(cell)  # wrong settings show now and not hours later
            if self.args.ray is not None and None in results.values():
                train_all = ray_runs.RayRuns(Comparison, self.args, self.base.device)

        def missing() -> Iterator[Cell]:
            for cell in plan:
                if interrupt.requested:
                    return
                results[cell] = results[cell] or self.finished(cell)  # another process may have trained it by now
                if results[cell] is None:
                    yield cell
                else:
                    tqdm.write(f"{cell}: finished earlier, not trained again", file=sys.stderr)

        failed, written = False, ""
        notice = "finishing this update, then evaluating and writing; once more skips the evaluation"
        with Interrupt(notice) as interrupt:
            try:
                base = base or self.result(BASE, self.base, finished=True)
                for cell, outcome in train_all(missing(), interrupt):
                    if isinstance(outcome, Exception):
                        failed = True
                        tqdm.write(f"{cell} failed and is left out: {outcome}", file=sys.stderr)
                    else:
                        results[cell] = outcome
                    written = write(base, [result for result in results.values() if result is not None])
            except KeyboardInterrupt:
                tqdm.write("skipped the evaluation of this run", file=sys.stderr)
            if base is None:
                print("Interrupted before anything was measured.")
                return INTERRUPTED
            print(written or write(base, [result for result in results.values() if result is not None]))
            if interrupt.requested:
                print("\nInterrupted; the same command goes on with the runs that are missing.")
                return INTERRUPTED
        return int(failed)

    def one_after_another(self, cells: Iterable[Cell], interrupt: Interrupt) -> Iterator[tuple[Cell, Outcome]]:
        """Train runs in this process; each with what came out."""
        for cell in cells:
            try:
                outcome: Outcome = self.train(cell, interrupt)
            except (OSError, RuntimeError) as error:  # such as a full disk, or numbers that are not finite
                outcome = error
            yield cell, outcome


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
