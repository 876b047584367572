"""Trains small agents, alone or as one of several processes: ``accelerate launch ... tests/together.py OUT CASES``."""

import sys
import warnings
from pathlib import Path

import torch
from conftest import Brightness
from safetensors.torch import save_file
from stable_baselines3.common.logger import Logger
from tiny import tiny_policy

from agents import CheckpointEvery, StopAfter, make
from agents.common.processes import current, whole
from agents.logs import open_logger
from agents.registry import BUNDLES, VARIANTS, known, options_in
from var_env import ScaleSchedule, Tokenizer, VARTextVectorEnv

RECIPES = [
    *(name for name, part in known().items() if part.__module__.startswith("agents.")),
    *VARIANTS,
    *BUNDLES,
    "vmr+panw+mp",
]
MORE = {  # name to recipe and options
    "epochs": ("grpo", {"epochs": 2, "minibatches": 2, "micro_batch": 3, "ema_decay": 0.5}),
    "batch": ("grpo+panw", {"advantage_scale": "batch", "kl_in": "reward", "target_kl": 0.5, "epochs": 2}),
    "split": ("vmr", {"split": "auto", "suffix_kl_coef": 0.1}),
    "forks": ("tree", {"forks": (1, 2), "group_size": 8}),
    "passes": ("ppo+mp", {"epochs": 2, "minibatches": 3}),
    "temperatures": ("grpo", {"temperature_lr": 1e-5, "epochs": 2}),
    "kl_step": ("grpo", {"kl_per_update": 1e-5, "epochs": 2}),
    "soft": ("grpo", {"soft_codes": 0.5, "epochs": 2}),
    "guided": ("grpo", {"kl": "full", "refresh_reference": 1, "entropy_coef": 0.1}),
}
CASES = {name: (name, {}) for name in RECIPES} | MORE
UPDATES = 3


def envs(rows):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        schedule = ScaleSchedule([(1, 1), (2, 2), (4, 4)], patch=16)
        tokenizer = Tokenizer(schedule, vocab_size=32, channels=4, width=8, blocks=1).eval().requires_grad_(False)
    return VARTextVectorEnv(rows, tokenizer=tokenizer, reward=Brightness())


def an_agent(case, **more):
    """P = 4 prompts of G = 4, which several processes share."""
    recipe, options = CASES[case]
    common = {"group_size": 4, "prompts_per_update": 4, "learning_rate": 5e-4, "seed": 0, "device": "cpu"}
    known_options = options_in(recipe)
    kept = {name: value for name, value in (common | options | more).items() if name in known_options}
    world = envs(1)
    agent = make(recipe, world, tiny_policy(world.tokenizer), **kept)
    agent.set_logger(Logger(None, []))
    for group in agent.optimizer.param_groups:
        group["eps"] = 1e-4  # or Adam's first step would be the gradient's sign, even where that is rounding
    return agent


def trained(case, callbacks=(), **more):
    agent = an_agent(case, **more)
    return agent.learn(10**6, [StopAfter(updates=UPDATES), *callbacks])


def weights(agent):
    """Of the policy and its average, whole and on the CPU; every process has to ask."""
    modules = {name: getattr(agent.unwrapped, name, None) for name in ("policy", "ema", "critic")}
    return {
        f"{kind}.{name}": whole(weight).contiguous()
        for kind, module in modules.items()
        if module is not None
        for name, weight in module.named_parameters()
    }


def main(out, cases):
    processes = current()
    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="agents.*")
    for case in cases:
        name, _, what = case.partition(":")
        if what == "stopped":  # a checkpoint before the last update, and logs
            agent = an_agent(name)
            agent.set_logger(open_logger(out / "logs", ["csv", "tensorboard"]))
            agent.learn(10**6, [CheckpointEvery(out / "checkpoints", 1), StopAfter(updates=UPDATES - 1)])
            agent.save(out / "agent.zip")
        else:
            agent = trained(name)
        found = weights(agent)
        found["budget"] = torch.tensor([agent.images_decoded, agent.tokens_sampled, agent.num_timesteps])
        save_file(found, out / f"{case.replace(':', '-')}-{processes.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
