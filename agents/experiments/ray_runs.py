"""The runs of a plan as tasks of Ray: what ``--ray`` does in place of one run after another, see `runs.Comparison.run`.

Every run that is not finished is one task. A worker makes the comparison anew from the options of the command and
trains one run of it, in the run's folder, as the command itself does without Ray. When the worker or its machine dies,
Ray starts the task again, elsewhere if need be, and it goes on from the run's last checkpoint. The process that was
called trains nothing: it measures the base policy, waits, and writes the report after each run.

All machines need the same code, the same packages and the same files, --out above all, at the same paths: a shared file
system. Workers take over the folder in which the command was called, and its ``sys.path``. What a run says while it
trains is in Ray's logs (/tmp/ray/session_latest/logs), and its curves are in --out, for TensorBoard.

Ctrl-C, or SIGTERM, is passed on to the workers: each finishes its update, saves, evaluates and writes; runs that wait
are dropped. A second one kills the workers, and the runs have their checkpoints. SIGTERM to a worker alone, as from a
machine that is taken back, makes it save, and its run goes on elsewhere.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from tqdm import tqdm

from agents.callbacks import Interrupt
from agents.experiments.agent_options import import_plugins
from agents.experiments.cells import Cell, Outcome, Result

if TYPE_CHECKING:
    from ray import ObjectRef

POLL = 1.0  # seconds between two looks for a signal
NO_BARS = {"TQDM_DISABLE": "1"}  # nobody watches those of a worker, and they would fill its log


class Trainer(Protocol):
    """What a worker needs of `runs.Comparison`."""

    def finished(self, cell: Cell) -> Result | None: ...

    def train(self, cell: Cell, interrupt: Interrupt) -> Result | None: ...


class Stopped(Exception):
    """A run's worker was asked to stop. Ray starts the task again, unless it was the driver that asked."""

    def __init__(self, result: Result | None) -> None:
        super().__init__(result)
        self.result = result  # so far; None before the first update

    def __str__(self) -> str:
        return "its worker was asked to stop, again and again; the same command goes on with it"


def train_one(
    make: Callable[[argparse.Namespace], Trainer], args: argparse.Namespace, cell: Cell, folder: str
) -> Result:
    """The task: train one run, in a worker, and return its result. `Stopped` after a signal."""
    os.chdir(folder)  # so that relative paths mean here what they mean there
    torch.set_num_threads(args.ray_cpus)
    import_plugins(getattr(args, "plugin", []))
    comparison = make(args)
    with Interrupt("finishing this update, then evaluating and writing") as interrupt:
        result = comparison.finished(cell) or comparison.train(cell, interrupt)
    if result is None or not result["finished"]:
        raise Stopped(result)
    return result


def require_answer(address: str) -> None:
    """``ConnectionError`` when nobody listens at HOST:PORT, for which Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():  # and not auto or local
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            advice = "give the address that `ray start --head` printed"
            raise ConnectionError(f"no Ray answers at {address} ({error}): {advice}") from None


class RayRuns:
    """Joins the cluster, or starts one, and trains runs there. A Ray that this process uses already is used as it is.

    Args:
        make: what makes the comparison of the options, `runs.Comparison`.
        args: the command's options, from which workers make it.
        device: of the base policy; runs train on the same kind of device.

    Raises:
        ConnectionError: there is no cluster at the address.
    """

    def __init__(
        self, make: Callable[[argparse.Namespace], Trainer], args: argparse.Namespace, device: torch.device
    ) -> None:
        import ray

        needs = {"CPU": args.ray_cpus, "GPU": int(device.type == "cuda") if args.ray_gpus is None else args.ray_gpus}
        options = {"out": args.out.absolute(), "device": device.type, "ray": None}
        self.make, self.args = make, argparse.Namespace(**{**vars(args), **options})
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        surroundings = {"env_vars": {"PYTHONPATH": path, **NO_BARS}}
        self.ours = not ray.is_initialized()
        if self.ours:
            address = args.ray or os.environ.get("RAY_ADDRESS") or "local"
            require_answer(address)
            ray.init(address, runtime_env=surroundings, log_to_driver=False, logging_level=logging.WARNING)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(machine.get(kind, 0) >= count for kind, count in needs.items()) for machine in machines):
            wanted = f"{needs['CPU']} CPUs and {needs['GPU']:g} GPUs (--ray-cpus, --ray-gpus)"
            tqdm.write(f"no machine of this Ray has {wanted}: the runs wait for one that joins", file=sys.stderr)
        self.task = ray.remote(train_one).options(
            num_cpus=needs["CPU"],
            num_gpus=needs["GPU"],
            max_retries=args.ray_retries,
            retry_exceptions=[Stopped],
            runtime_env=surroundings,
        )

    def __call__(self, cells: Iterable[Cell], interrupt: Interrupt) -> Iterator[tuple[Cell, Outcome]]:
        """Each run with what came out, in the order in which they end."""
        import ray

        waiting = {self.task.remote(self.make, self.args, cell, os.getcwd()): cell for cell in cells}
        passed_on = False
        try:
            with tqdm(total=len(waiting), unit="run", desc="runs", dynamic_ncols=True) as bar:
                while waiting:
                    if interrupt.requested and not passed_on:
                        passed_on = True
                        for task in waiting:
                            ray.cancel(task)  # as Ctrl-C in the worker; a run that waits never starts
                    for task in ray.wait([*waiting], timeout=POLL)[0]:
                        outcome = self.outcome(task, interrupt)
                        bar.update()
                        yield waiting.pop(task), outcome
        finally:
            for task in waiting:
                ray.cancel(task, force=True)
            if self.ours:
                ray.shutdown()

    def outcome(self, task: ObjectRef[Result], interrupt: Interrupt) -> Outcome:
        """The result of a task that ended, ``None`` if it was dropped, or the error."""
        import ray
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        try:
            return ray.get(task)
        except TaskCancelledError:
            return None
        except RayTaskError as error:  # it was raised in the task
            stopped = isinstance(error.cause, Stopped) and interrupt.requested
            return error.cause.result if stopped else error.cause
        except RayError as error:
            return RuntimeError(f"its worker was lost, also after --ray-retries {self.args.ray_retries}: {error}")
