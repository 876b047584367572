"""An idea of your own beside the paper's: a wrapper in a dozen lines, trained beside the agent that it wraps.

    python examples/custom_agent.py                                   # two or three minutes on two cores
    python examples/custom_agent.py --agent vmr+panw --images 6400

The idea here is a curriculum, coarse grids first. To try another, change `CoarseFirst`: `token_weights` gets the
rollout (grids, rewards, regions that were read, ...) and the scales of the update, and returns what each token counts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from common import (
    METHOD,
    ImageBar,
    add_model_options,
    clear_errors,
    copy_of,
    load_policy,
    make_agent,
    make_env,
    make_parser,
    require_at_least_one,
    table,
)

from agents import GRPO, StopAfter, Wrapper, evaluate, held_out_scenes
from agents.grpo import TokenWeights
from agents.rollout import Rollout


class CoarseFirst(Wrapper):
    """Grid t + 1 joins the policy term after ``t * updates_per_scale`` updates; the KL holds all grids all the time."""

    def __init__(self, agent: GRPO | Wrapper, *, updates_per_scale: int = 3) -> None:
        super().__init__(agent)
        self.updates_per_scale = updates_per_scale

    def token_weights(self, rollout: Rollout, steps: range) -> TokenWeights:
        weights = self.agent.token_weights(rollout, steps)  # policy and kl, (B, n) each
        sizes = torch.tensor([self.policy.schedule.sizes[t] for t in steps])
        scale = torch.tensor(list(steps)).repeat_interleave(sizes)  # (n,)
        joined = scale * self.updates_per_scale <= self.n_updates
        return weights._replace(policy=weights.policy * joined.to(weights.policy))


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add_model_options(parser)
    parser.add_argument("--agent", default="grpo", help="what to wrap, see compare.py (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1600, help="budget of each agent (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    with clear_errors():
        require_at_least_one(images=args.images, prompts=args.prompts)
        base = load_policy(args)
        env = make_env(base)
        plain, idea = (
            make_agent(args.agent, copy_of(base), env, METHOD, seed=args.seed, device=base.device) for _ in range(2)
        )
    scenes = held_out_scenes(env.world, args.prompts)
    measured = {"base policy": evaluate(base, env, scenes).means()}
    for agent in (plain, CoarseFirst(idea)):
        agent.learn(agent.timesteps(args.images), [StopAfter(images=args.images), ImageBar(args.images, args.agent)])
        measured[str(agent)] = evaluate(agent.policy, env, scenes).means()
    rows = [[name, f"{means['reward']:.3f}", f"{means['word_accuracy']:.3f}"] for name, means in measured.items()]
    print(table([f"{args.prompts} held-out prompts", "OCR reward", "Word Accuracy"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
