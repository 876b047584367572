"""Small agents on the small world of conftest.py."""

import torch
from stable_baselines3.common.logger import Logger, configure

from agents import GRPO
from agents.policies.var_text import SHARPNESS_GAIN, VARTextPolicy
from var_env import VARTextVectorEnv


def tiny_policy(tokenizer, seed=0, precision="fp32", scale=3.0, **options):
    """Random weights; a larger scale than at birth, so that prompts and grids make a difference."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = VARTextPolicy(tokenizer, width=32, layers=1, heads=2, precision=precision, **options)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(scale if weight.ndim > 1 else 1.0)
    return policy.eval()


def tiny_envs(parts, num_envs=2):
    return VARTextVectorEnv(num_envs, **parts)


def tiny_agent(parts, cls=GRPO, precision="fp32", policy_seed=0, **options):
    """P = 2 prompts, G = 4 images, on the CPU, with a logger that writes nothing."""
    policy = tiny_policy(parts["tokenizer"], policy_seed, precision)
    settings = {"group_size": 4, "prompts_per_update": 2, "seed": 0, "device": "cpu"} | options
    agent = cls(policy, VARTextVectorEnv(2, **parts), **settings)
    if "tensorboard_log" not in options:
        agent.set_logger(Logger(None, []))
    return agent


def csv_logger(folder):
    return configure(str(folder), ["csv"])


def weights_of(module):
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def gradients(agent, rollout, advantages, steps=range(3)):
    """The gradient that an update hands to its optimiser, and nothing learned."""
    agent.optimizer = torch.optim.SGD(agent.policy.parameters(), lr=0.0)
    agent.learning_rate, agent.max_grad_norm = 0.0, 1e9
    agent._setup_lr_schedule()
    agent.update(rollout, advantages, steps)
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in agent.policy.named_parameters()
    }


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def nudge(agent, scale=0.05):
    """Move the policy off its reference."""
    with torch.no_grad():
        for name, weight in agent.policy.named_parameters():
            size = scale / SHARPNESS_GAIN if name == "sharpness" else scale
            weight += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


STEPS_A_ROLLOUT = 2 * 4 * 3  # P * G * T
