"""Runs on common ground, for `vartext compare` and its like: what all have in common, one run, and a plan of many.

A run is a `Cell`: an agent, its settings and a seed. Its folder, OUT/LABEL/seedK, holds all that it writes, and when
result.json there says that it is finished, it is not trained again. One that was interrupted or killed goes on from its
last checkpoint, exactly. A folder holds one experiment: when settings are others now, defaults included, it is refused,
see comparable.py. The runs of a plan are trained one after another, or with ``--ray`` many at a time, see ray_runs.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from agents import (
    GRPO,
    Agent,
    Checkpoints,
    ConflictProbe,
    MaskPropagation,
    StopAfter,
    Wrapper,
    evaluate,
    held_out_scenes,
    recipes,
)
from agents.callbacks import CheckpointEvery, Interrupt, StopOnSignal
from agents.common.processes import current
from agents.evaluation import Evaluation
from agents.experiments import figures, gallery, ray_runs, run_file, tables, tuned
from agents.experiments.agent_options import OF_SCRIPTS, settings_of
from agents.experiments.callbacks import CurveEval, ImageBar, budget
from agents.experiments.cells import BASE, Cell, Outcome, Result
from agents.experiments.comparable import NOT_COMPARED, read, require_same
from agents.experiments.loading import copy_of, load_policy, make_env
from agents.experiments.options import (
    INTERRUPTED,
    clear_errors,
)
from agents.experiments.output import write_json
from agents.experiments.run_options import Preset, learning_rate_of, sampler_of
from agents.experiments.tensorboard import record_hparams, write_layout
from agents.logs import open_logger
from agents.policies.base import Policy
from var_env import VARTextVectorEnv

SCENE_SEED, NOISE_SEED = 0, 0  # of the held-out prompts, and of the sampler when it draws for them


class Comparison:
    """The common ground: settings, base policy, environment, held-out prompts and decoding.

    Args:
        args: of a parser with `add_run_options`, after `finish`.
        judged_on: the split of the prompts that the results are of.
    """

    def __init__(self, args: argparse.Namespace, judged_on: str = "test") -> None:
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
        self.test = held_out_scenes(self.env.world, self.settings.test_prompts, SCENE_SEED, judged_on)
        self.val = held_out_scenes(self.env.world, self.settings.val_prompts, SCENE_SEED, "val")
        self.decoding = sampler_of(vars(self.settings), evaluating=True)
        if self.decoding.guided:
            self.base.null_cond(self.base.encode_prompts([self.test[0].prompt]))  # a policy without one says so now
        # All that defines the experiment, what was not given included: runs of one folder have it in common.
        self.config = dataclasses.asdict(self.settings) | {
            "base_weights": fingerprint(self.base),
            "reward": args.reward,
            "reward_kwargs": args.reward_kwargs,
            "prompts_from": args.prompts_from,
            "judged_on": judged_on,
            **run_file.fingerprint(self.env.world),
        }
        self.method: dict[str, Any] = args.method
        self.tuned = tuned.load(args.tuned, self.config)
        self.described = self.config | {
            "seeds": args.seeds,
            "policy": str(args.policy or "base"),
            "machine": machine(self.base),
            "versions": versions(),
            "models_of_the_reward": self.env.reward.describe(),
        }
        self.finished(BASE)  # so that another experiment in this folder is refused before anything is written

    @functools.cached_property
    def before(self) -> Evaluation:
        """The base policy on the prompts of the curves."""
        return evaluate(self.base, self.env, self.val, self.decoding, NOISE_SEED)

    def cell(self, recipe: str, seed: int, **changes: Any) -> Cell:
        """A run of a recipe, its label, with the settings that it was tuned to and some changed."""
        own = {name: value for name, value in self.tuned.get(recipe, {}).items() if name not in self.args.given}
        chosen = own | self.method | changes
        method = settings_of(recipe, chosen)
        if "temperature" in chosen:  # the sampler's while training, which is no option of an agent
            method["temperature"] = chosen["temperature"]
        if method.get("split", "auto") != "auto":
            method["split"] = self.base.schedule.middle_step(method["split"])
        return Cell(recipe, recipe, seed, method)

    def finished(self, cell: Cell) -> Result | None:
        """The result of a run that needs no repeating. ``ValueError`` when it was made with other settings."""
        folder = figures.run_folder(self.out, cell.label, cell.seed)
        result = read(folder / "result.json", "config", "finished")
        if result is not None:
            stopped = result["finished"] and result.get("stopped_at") is not None  # by the cap on its time
            require_same(self.asked(cell), result["config"], folder, () if stopped else NOT_COMPARED)
            return result if result["finished"] else None
        config = read(folder / "config.json")
        if config is not None:  # begun, and perhaps worth hours
            require_same(self.asked(cell), config, folder)
        elif Checkpoints(folder / "checkpoints").paths():
            raise ValueError(
                f"{folder} holds checkpoints and no config.json, so that nothing tells their settings: choose another "
                "--out, or delete that folder"
            )
        return None

    def asked(self, cell: Cell) -> dict[str, Any]:
        """All settings of a run, what was not given included, as its files have them."""
        default = recipes.options_in(cell.recipe) if cell.recipe else {}
        known = {name: value for name, value in default.items() if name not in OF_SCRIPTS}
        everything = known | self.config | cell.method | {"recipe": cell.recipe}
        settings: dict[str, Any] = json.loads(json.dumps(everything, default=str))  # tuples become lists
        return settings

    def result(
        self, cell: Cell, policy: Policy, best_of: int = 1, mask: MaskPropagation | None = None, **more: Any
    ) -> Result:
        """Evaluate a policy on the test prompts, save images and the result, and return it; ``mask`` is the run's."""
        tqdm.write(f"{cell}: evaluating on {len(self.test)} held-out prompts", file=sys.stderr)
        evaluation = evaluate(
            policy,
            self.env,
            self.test,
            self.decoding,
            NOISE_SEED,
            best_of=best_of,
            keep_grids=figures.SHOWN,
            reference=self.base,
        )
        result = {
            "agent": cell.label,
            "seed": cell.seed,
            "config": self.asked(cell),
            "diagnostics": policy.diagnostics(),
            **more,
            **tables.measure(evaluation),
        }
        folder = figures.run_folder(self.out, cell.label, cell.seed)
        figures.save_strip(folder / "samples.png", evaluation)
        gallery.save(folder, evaluation, policy.tokenizer, mask)
        write_json(folder / "result.json", result)
        return result

    def agent(self, cell: Cell) -> Agent | Wrapper:
        """A new agent on a copy of the base policy."""
        settings = dataclasses.asdict(self.settings) | cell.method
        decoding = sampler_of(settings)
        available = recipes.options_in(cell.recipe).keys() | cell.method.keys() - {"temperature"}
        settings["learning_rate"] = learning_rate_of(settings)
        chosen = {name: value for name, value in settings.items() if name in available}
        own = {"decoding": decoding, "seed": cell.seed, "device": self.base.device}
        return recipes.make(cell.recipe, self.env, copy_of(self.base), **{**chosen, **own})

    def train(self, cell: Cell, interrupt: Interrupt) -> Result | None:
        """One run; ``None`` when it was interrupted before its first update."""
        settings, folder = self.settings, figures.run_folder(self.out, cell.label, cell.seed)
        cap = settings.seconds or None
        saves = CheckpointEvery(folder / "checkpoints", self.save_every)
        agent, step = self.start(cell, folder, saves.checkpoints)
        agent.set_logger(open_logger(folder, ["tensorboard", "csv", *filter(None, [self.args.track])], step))
        callbacks: list[BaseCallback] = [
            saves,
            CurveEval(
                settings.eval_every,
                self.val,
                "val",
                NOISE_SEED,
                self.decoding,
                base=self.before,
                reference=self.base,
            ),
            StopAfter(images=settings.images, seconds=cap),
            StopOnSignal(interrupt),
            ImageBar(settings.images, str(cell)),
        ]
        if isinstance(agent.unwrapped, GRPO):
            callbacks.insert(2, ConflictProbe(4 * settings.eval_every))  # costs as much as two or three updates
        steps = max(agent.timesteps(settings.images) - agent.num_timesteps, 0)
        agent.learn(steps, callbacks, reset_num_timesteps=step is None)
        if agent.n_updates == 0 and interrupt.requested:
            agent.logger.close()
            return None
        agent.best_policy.save(folder / "policy.safetensors")
        short = agent.images_decoded < settings.images
        capped = short and cap is not None and agent.seconds >= cap
        if capped:
            tqdm.write(
                f"{cell}: stopped at {agent.images_decoded} images, after {cap:.0f} s of training (--seconds)",
                file=sys.stderr,
            )
        finished = not (short and interrupt.requested)
        result = self.result(
            cell,
            agent.best_policy,
            agent.best_of,
            gallery.mask_of(agent),
            finished=finished,
            stopped_at=agent.images_decoded if capped or not finished else None,
            budget=budget(agent),
        )
        record_hparams(agent.logger, self.asked(cell) | {"agent": cell.label, "seed": cell.seed}, result)
        agent.logger.dump(agent.images_decoded)
        agent.logger.close()
        if finished:
            shutil.rmtree(saves.checkpoints.folder)
        return result

    def start(self, cell: Cell, folder: Path, checkpoints: Checkpoints) -> tuple[Agent | Wrapper, int | None]:
        """The agent of an earlier attempt at the run, with the images that it has seen, or a new one and ``None``."""
        checkpoints.tidy()
        config = folder / "config.json"
        if checkpoints.paths() and config.is_file():
            require_same(self.asked(cell), json.loads(config.read_text()), folder)
            agent = checkpoints.load(self.env, self.base.device)
            tqdm.write(f"{cell}: goes on after update {agent.n_updates}", file=sys.stderr)
            return agent, agent.images_decoded
        shutil.rmtree(folder, ignore_errors=True)
        write_json(config, self.asked(cell))
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

        if base is None:  # from here on the folder is this experiment's, whatever comes next
            write_json(figures.run_folder(self.out, BASE.label, BASE.seed) / "config.json", self.asked(BASE))
        failed, written = False, ""
        notice = "finishing this update, then evaluating and writing; once more skips the evaluation"
        with Interrupt(notice) as interrupt:
            try:
                base = base or self.result(BASE, self.base, finished=True, stopped_at=None)
                write_layout(figures.run_folder(self.out, BASE.label, None))
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


def machine(policy: Policy) -> dict[str, Any]:
    """What the numbers of a run depend on, and its seconds: device, precision, and of a CPU its units and threads."""
    with policy.autocast():
        device = policy.device.type
        bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    return {
        "device": str(policy.device),
        "precision": "bf16 matrix products" if bf16 else "fp32",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "bf16 units": bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Of Python, the machine, and the packages that a result depends on."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in ("vartext", "torch", "numpy", "gymnasium", "stable-baselines3", "rapidocr", "onnxruntime"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
