"""The options that all runs of a comparison have in common, for `runs.Comparison`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agents.common.schedules import SCHEDULES, make_schedule
from agents.experiments.agent_options import add_agent_options, agent_settings
from agents.experiments.options import (
    Parser,
    add_model_options,
    add_prompts_option,
    add_reward_options,
    add_track_option,
    option_of,
    require_at_least_one,
)
from agents.experiments.tuned import COMMON

if TYPE_CHECKING:
    from agents.sampling import Decoding


def option(default: Any, text: str, rare: bool = False, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "rare": rare, "choices": choices})


@dataclass(frozen=True)
class Preset:
    """What all runs have in common. Every field is an option of the command line."""

    images: int = option(1280, "budget of each run in reward calls, one for each image decoded")
    seconds: float = option(0.0, "cap on a run's training time; it is compared with none then; 0 for no cap", rare=True)
    learning_rate: float = option(5e-5, "AdamW's")
    schedule: str = option(
        "linear", "what becomes of the learning rate on the way to --images", rare=True, choices=SCHEDULES
    )
    warmup: float = option(0.1, "share of the way on which it rises from 0", rare=True)
    group_size: int = option(8, "G, images for each prompt; prefixes for each in VMR's prefix updates")
    prompts_per_update: int = option(8, "P, so that an update learns from P * G rows")
    kl_coef: float = option(0.02, "weight of the KL to the base policy; 0 is without")
    temperature: float = option(1.0, "of the sampler while training")
    eval_temperature: float = option(1.0, "of the sampler in evaluations", rare=True)
    top_k: int = option(0, "keep the k likeliest tokens, in training and evaluations; 0 keeps all", rare=True)
    top_p: float = option(1.0, "keep the fewest tokens of this probability, in both", rare=True)
    guidance: float = option(1.0, "classifier-free guidance, in both; 1 is off", rare=True)
    test_prompts: int = option(256, "held-out prompts of the table, from the test split", rare=True)
    val_prompts: int = option(64, "held-out prompts of the curves, from the val split", rare=True)
    eval_every: int = option(10, "updates between two evaluations while training", rare=True)

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        counts = {name: value for name, value in values.items() if isinstance(value, int) and name != "top_k"}
        require_at_least_one(**counts)
        learning_rate_of(values)  # refuses a schedule that makes no sense
        for name, value in values.items():
            if not isinstance(value, str) and not value >= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {value}")


def sampler_of(settings: Mapping[str, Any], evaluating: bool = False) -> Decoding:
    """How images are drawn in training, or in evaluations, by the fields of `Preset`.

    Raises:
        ValueError: as in `Decoding`.
    """
    from agents.sampling import Decoding  # not above: it takes torch with it, and --help answers without

    temperature = settings["eval_temperature" if evaluating else "temperature"]
    return Decoding(temperature, settings["top_k"], settings["top_p"], settings["guidance"])


def learning_rate_of(settings: Mapping[str, Any]) -> Any:
    """What an agent takes as its learning rate: the number, or the schedule that begins or ends with it.

    Args:
        settings: with the entries ``learning_rate``, ``schedule`` and ``warmup`` of `Preset`.

    Raises:
        ValueError: an unknown schedule, a rate of 0 with a schedule, or a warmup that is no share of the way.
    """
    rate, schedule, warmup = (settings[name] for name in ("learning_rate", "schedule", "warmup"))
    return rate if schedule == "constant" and not warmup else make_schedule(schedule, rate, warmup)


def add_settings_option(parser: Parser) -> None:
    """``--settings``, for commands that take what ``vartext tune`` found."""
    parser.add_argument(
        "--settings",
        dest="tuned",
        metavar="tuned|common|FILE",
        help="each agent's own settings as vartext tune found them, or the same for all; options given come first "
        "(default: tuned where the world has them)",
    )


def add_run_options(parser: Parser, presets: Mapping[str, Preset]) -> None:
    """``--device`` and so on, the fields of `Preset`, ``--ray``, and the agents' settings, for `finish`."""
    add_model_options(parser)
    add_reward_options(parser)
    add_prompts_option(parser)
    add_track_option(parser)
    common = parser.add_argument_group("what all runs have in common")
    for entry in dataclasses.fields(Preset):
        values = {name: getattr(preset, entry.name) for name, preset in presets.items()}
        names = {value: [name for name in values if values[name] == value] for value in values.values()}
        default = ", ".join(f"{v} in {' and '.join(of)}" if len(names) > 1 else str(v) for v, of in names.items())
        group = parser.rare if entry.metadata["rare"] else common
        group.add_argument(
            option_of(entry.name),
            type=type(entry.default),
            choices=entry.metadata["choices"],
            metavar=None if entry.metadata["choices"] else type(entry.default).__name__.upper(),
            help=f"{entry.metadata['help']} (default: {default})",
        )
    parser.rare.add_argument(
        "--save-every",
        type=int,
        default=10,
        metavar="UPDATES",
        help="between two checkpoints, from which a run that was killed goes on (default: %(default)s)",
    )
    add_ray_options(parser)
    taken = [entry.name for entry in dataclasses.fields(Preset)]
    parser.add_later(lambda _: add_agent_options(parser, taken))


def finish(args: argparse.Namespace, preset: Preset) -> None:
    """Set ``args.settings``, a `Preset` with what was given, ``args.given``, which fields of it that are, and
    ``args.method``, the other settings of the agents."""
    given = {entry.name: getattr(args, entry.name) for entry in dataclasses.fields(Preset)}
    args.given = {name: value for name, value in given.items() if value is not None}
    args.settings = dataclasses.replace(preset, **args.given)
    for evaluating in (False, True):
        sampler_of(vars(args.settings), evaluating)  # refuses what makes no sense
    args.tuned = getattr(args, "tuned", COMMON)
    require_at_least_one(save_every=args.save_every)
    check_ray(args)
    if args.track:
        from agents.trackers import require_wandb  # not above: it takes torch with it

        require_wandb()
    args.method = {name: value for name, value in agent_settings(args).items() if name not in given}


def add_ray_options(parser: Parser) -> None:
    """``--ray`` and its like, for `check_ray` and `ray_runs.RayRuns`."""
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="train many runs at a time as tasks of Ray, on this machine or in a cluster, see --help-all "
        "(default: one run after another)",
    )
    group = parser.rare_group(
        "many runs at a time, with Ray",
        "--ray without an address uses the cluster that RAY_ADDRESS names, or else all CPUs and GPUs of this\n"
        "machine; auto is the cluster that this machine is part of, or give HOST:6379 or ray://HOST:10001. On several\n"
        "machines, --out must be on a file system that they share, with code and files at the same paths, and agents\n"
        "of your own must come by --plugin. The next word is taken for the address, so write a bare --ray last.",
    )
    group.add_argument(
        "--ray-gpus",
        type=float,
        metavar="SHARE",
        help="GPUs a run, 0 to 1: with 0.25, four runs share one. Ray counts shares and does not divide the memory, "
        "so that all four have to fit (default: 1 when --device is a GPU, else 0)",
    )
    group.add_argument(
        "--ray-cpus",
        type=int,
        default=1,
        metavar="CPUS",
        help="CPUs a run, each a thread of torch; as many runs go on at a time as there are CPUs, and GPUs, for. The "
        "number of threads may change the last digits of a score (default: %(default)s)",
    )
    group.add_argument(
        "--ray-retries",
        type=int,
        default=3,
        metavar="TIMES",
        help="how often a run whose worker died goes on from its last checkpoint before it is left out "
        "(default: %(default)s)",
    )


def check_ray(args: argparse.Namespace) -> None:
    """``ImportError`` when there is no Ray to use, ``ValueError`` for numbers that make no sense."""
    if args.ray is None:
        return
    try:
        import ray  # noqa: F401
    except ImportError:
        raise ImportError('--ray needs the package ray: pip install "vartext[ray]", or leave out --ray') from None
    if args.ray_gpus is not None and not 0 <= args.ray_gpus <= 1:
        raise ValueError(f"--ray-gpus must lie in [0, 1], for a run uses one GPU at most, got {args.ray_gpus}")
    if args.ray_cpus < 1:
        raise ValueError(f"--ray-cpus must be at least 1, got {args.ray_cpus}")
    if args.ray_retries < 0:
        raise ValueError(f"--ray-retries must be at least 0, got {args.ray_retries}")
