"""The contract of a backbone as tests that you subclass: if they pass, every agent of this package can train it.

In a test file of your own::

    from agents.testing import PolicyContract, TokenizerContract

    class TestMyPolicy(PolicyContract):
        def make_policy(self):
            return MyPolicy(MyTokenizer(...), width=32)  # small, random weights, the same at every call

    class TestMyTokenizer(TokenizerContract):
        def make_tokenizer(self):
            return MyTokenizer(...)

pytest then runs each method whose name begins with ``test_``. A failure names the trap it stands for; see
``docs/your-model.md``.
"""

from __future__ import annotations

import tempfile
import unittest
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import Logger
from torch import Tensor

from agents import recipes
from agents.policies.base import Policy
from rewards.base import HasWords, Reward, RewardOutput
from var_env.scenes import Scene
from var_env.tokenizers.base import VisualTokenizer
from var_env.vector import VARTextVectorEnv

BATCH = 3  # one row for each of the contract's prompts


class PolicyContract:
    """What every backbone has to satisfy.

    Attributes:
        prompts: three that the policy understands, of different lengths where prompts have any.
        tolerance: of logits that two paths compute, absolute and relative.
        updates: of each agent that is tried.
    """

    prompts: Sequence[str] = (
        'A navy sign that says "KITE" above "RUN" in white letters',
        '"OX" in pink on a black wall',
        '"A"',
    )
    tolerance = 1e-4
    updates = 5

    def make_policy(self) -> Policy:
        """A small policy in eval mode, the same at every call, in fp32 and far enough from a uniform distribution that
        prompts and grids make a difference to its logits."""
        raise NotImplementedError

    # What the tests share --------------------------------------------------------------------------------------------

    def close(self, actual: Tensor, expected: Tensor, what: str) -> None:
        torch.testing.assert_close(
            actual, expected, atol=self.tolerance, rtol=self.tolerance, msg=lambda text: f"{what}: {text}"
        )

    def start(self, seed: int = 0) -> tuple[Policy, Any, list[Tensor]]:
        """A policy, the condition of the prompts, and random grids."""
        policy = self.make_policy()
        return policy, policy.encode_prompts(list(self.prompts)), random_grids(policy.tokenizer, BATCH, seed)

    # The tests -------------------------------------------------------------------------------------------------------

    def test_shapes(self) -> None:
        policy, cond, grids = self.start()
        steps, tokenizer = range(len(policy.schedule)), policy.tokenizer
        logits = policy(cond, grids, steps)
        assert logits.shape == (BATCH, policy.schedule.total_tokens, tokenizer.depth, tokenizer.vocab_size)
        assert logits.dtype == torch.float32, "logits are fp32, whatever the model computes in"
        assert not policy.training, "make_policy() has to return a policy in eval mode"
        assert not any("tokenizer" in name for name, _ in policy.named_parameters()), "the tokenizer is not trained"

    def test_cached_equals_teacher_forced(self) -> None:
        """Ruling 1 of the algorithms: what was sampled is scored by the same function."""
        policy, cond, grids = self.start()
        steps = range(len(policy.schedule))
        self.close(cached_logits(policy, policy.begin(cond), grids, steps), policy(cond, grids, steps), "cached path")

    def test_a_range_of_steps_is_a_part_of_the_whole(self) -> None:
        """VMR's updates run over a prefix or a suffix, with only the grids that these need."""
        policy, cond, grids = self.start()
        length, slices = len(policy.schedule), policy.schedule.slices
        whole = policy(cond, grids, range(length))
        for first, stop in ((0, 1), (0, length // 2), (length // 2, length), (length - 1, length)):
            if first == stop:
                continue
            part = policy(cond, grids[: stop - 1], range(first, stop))
            self.close(part, whole[:, slices[first].start : slices[stop - 1].stop], f"steps {first} to {stop - 1}")

    def test_a_grid_depends_on_earlier_grids_only(self) -> None:
        """All tokens of a grid are drawn at once, so none may see another of its own grid, nor of a later one. And a
        grid does see those before it: a mask that is causal within a scale, or blind to the canvas, fails here."""
        policy, cond, grids = self.start()
        steps, vocab = range(len(policy.schedule)), policy.tokenizer.vocab_size
        logits = policy(cond, grids, steps)
        for t in {0, len(steps) // 2, len(steps) - 2} & set(steps[:-1]):
            changed = [*grids[:t], (grids[t] + 1) % vocab, *grids[t + 1 :]]
            moved = (policy(cond, changed, steps) - logits).abs().amax((2, 3))  # (B, L)
            until = policy.schedule.slices[t].stop
            assert moved[:, :until].max() <= self.tolerance, f"grid {t} changes the logits of itself or of earlier ones"
            assert moved[:, until:].max() > 0, f"nothing after grid {t} depends on it"
            within = slice(until, policy.schedule.slices[t + 1].stop)
            assert (moved[:, within] > 0).any(1).all(), f"grid {t + 1} does not see grid {t} in every row"

    def test_every_token_of_a_grid_sees_all_of_the_grid_before(self) -> None:
        """A change in the last token of a grid reaches the first token of the next one. A mask that is silently causal,
        the default of most decoders, lets it reach the later tokens only."""
        policy, cond, grids = self.start()
        schedule, vocab = policy.schedule, policy.tokenizer.vocab_size
        logits = policy(cond, grids, range(len(schedule)))
        for t in range(len(schedule) - 1):
            if schedule.sizes[t] == 1 or schedule.is_raster:
                continue
            last = grids[t].clone()
            last[:, -1] = (last[:, -1] + 1) % vocab
            moved = policy(cond, [*grids[:t], last, *grids[t + 1 :]], range(len(schedule))) - logits
            first = moved[:, schedule.slices[t + 1].start].abs().amax((1, 2))  # (B,)
            assert (first > 0).any(), f"the first token of grid {t + 1} does not see the last one of grid {t}"

    def test_the_prompt_matters_and_padding_does_not(self) -> None:
        policy, cond, grids = self.start()
        steps, same = range(len(policy.schedule)), [grid[:1].expand(BATCH, -1, -1) for grid in grids]
        together = policy(cond, same, steps)
        for row, prompt in enumerate(self.prompts):
            alone = policy(policy.encode_prompts([prompt]), [grid[:1] for grid in grids], steps)
            self.close(alone[0], together[row], f"{prompt!r} alone and beside longer prompts")
        assert (together[0] - together[1]).abs().max() > self.tolerance, "two prompts have the same logits"

    def test_null_cond_forgets_the_prompt(self) -> None:
        """Classifier-free guidance compares with a model that knows nothing of the prompt, not even its length."""
        policy, _, grids = self.start()
        one = [grid[:1] for grid in grids]
        nulls = [
            policy(policy.null_cond(policy.encode_prompts([prompt])), one, range(len(policy.schedule)))
            for prompt in self.prompts[:2]
        ]
        self.close(nulls[0], nulls[1], "empty conditions of two prompts")
        conditional = policy(policy.encode_prompts([self.prompts[0]]), one, range(len(policy.schedule)))
        assert (nulls[0] - conditional).abs().max() > self.tolerance, "the empty condition is the prompt's"

    def test_fork_equals_fresh(self) -> None:
        """One gather repeats, reorders and drops rows of a cache, and neither side writes into the other's."""
        policy, cond, grids = self.start()
        length = len(policy.schedule)
        m = max(1, length // 2)
        cache, canvas = policy.begin(cond), policy.tokenizer.blank(BATCH)
        with torch.no_grad():
            for t in range(m):
                features = policy.tokenizer.read(t, canvas)
                _, cache = policy.step(cache, t, features, grids[t - 1] if t else None)
                canvas = policy.tokenizer.write(t, canvas, grids[t])
        index = torch.tensor([2, 0, 0, 1], device=policy.device)
        forked, mine = policy.fork(cache, index), [grid[index] for grid in grids]
        rest = range(m, length)
        self.close(cached_logits(policy, forked, mine, rest), policy(policy.take(cond, index), mine, rest), "the fork")
        self.close(cached_logits(policy, cache, grids, rest), policy(cond, grids, rest), "the original after a fork")

    def test_evaluate_is_the_log_softmax_of_forward(self) -> None:
        policy, cond, grids = self.start()
        steps = range(len(policy.schedule))
        logp, entropy = policy.evaluate(cond, grids, steps)
        everything = policy(cond, grids, steps).double().log_softmax(-1)
        chosen = torch.cat(grids, 1)
        self.close(logp, everything.gather(-1, chosen[..., None])[..., 0].float(), "log-probabilities")
        self.close(entropy, -(everything.exp() * everything).sum(-1).float(), "entropies")

    def test_gradient_reaches_every_parameter(self) -> None:
        policy, cond, grids = self.start()
        logp, entropy = policy.evaluate(cond, grids, range(len(policy.schedule)))
        (logp.sum() + entropy.square().sum()).backward()
        for name, weight in policy.named_parameters():
            reached = weight.grad is not None and bool(weight.grad.any())
            assert reached or not weight.requires_grad, f"no gradient reaches {name}: use it, freeze it or leave it out"

    def test_logits_in_pieces_change_nothing(self) -> None:
        """`logit_chunk` asks `logits` for a part of one grid, and for several whole ones."""
        policy, cond, grids = self.start()
        if type(policy).hidden is Policy.hidden:
            raise unittest.SkipTest(f"{type(policy).__name__} has no hidden(), and so no logit_chunk")
        length = len(policy.schedule)
        for steps in (range(length), range(length // 2, length)):
            values, gradients = self.learn(policy, cond, grids, steps)
            for chunk in (1, 3, 7, policy.schedule.total_tokens):
                policy.logit_chunk = chunk
                pieces, in_pieces = self.learn(policy, cond, grids, steps)
                self.close(pieces, values, f"log-probabilities and entropies, logit_chunk={chunk}")
                for name, gradient in gradients.items():
                    self.close(in_pieces[name], gradient, f"gradient of {name}, logit_chunk={chunk}")
                with torch.no_grad():
                    logp, _ = policy.evaluate(cond, grids, steps)
                self.close(logp, values[0], f"log-probabilities without gradient, logit_chunk={chunk}")
            policy.logit_chunk = None

    def test_recomputed_activations_change_nothing(self) -> None:
        policy, cond, grids = self.start()
        if type(policy).recompute_activations is Policy.recompute_activations:
            raise unittest.SkipTest(f"{type(policy).__name__} has no recompute_activations()")
        plain, config = self.make_policy(), str(policy.config)
        policy.recompute_activations()
        assert str(policy.config) == config, "a file of the policy does not depend on how it is trained"
        steps, kept = range(len(policy.schedule)), []
        results = []
        for one in (plain, policy):
            kept.append(0)

            def keep(tensor: Tensor) -> Tensor:
                kept[-1] += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                results.append(self.learn(one, cond, grids, steps))
        (values, gradients), (again, recomputed) = results
        self.close(again, values, "log-probabilities and entropies")
        for name, gradient in gradients.items():
            self.close(recomputed[name], gradient, f"gradient of {name}")
        if not policy.config.get("gradient_checkpointing"):
            assert kept[1] < kept[0], "as much is kept for the backward pass as without"

    def learn(
        self, policy: Policy, cond: Any, grids: Sequence[Tensor], steps: range
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `Policy.evaluate` gives, ``(2, B, n, D)``, and the gradients of a loss of it."""
        found = torch.stack(policy.evaluate(cond, grids, steps))
        weights = torch.linspace(-1, 1, found.numel(), device=found.device).view_as(found)
        policy.zero_grad()
        (weights * found).sum().backward()
        return found.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    def test_deterministic(self) -> None:
        """Dropout, of labels or of anything, is off in eval mode."""
        policy, cond, grids = self.start()
        steps = range(len(policy.schedule))
        assert torch.equal(policy(cond, grids, steps), policy(cond, grids, steps))

    def test_save_and_load(self) -> None:
        policy, cond, grids = self.start()
        steps = range(len(policy.schedule))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "policy.safetensors"
            policy.save(path)
            loaded = type(policy).load(path, policy.tokenizer).eval()
            again = loaded.encode_prompts(list(self.prompts))
            assert torch.equal(loaded(again, grids, steps), policy(cond, grids, steps))
            assert not any("tokenizer" in name for name in policy.state_dict()), "the tokenizer has a file of its own"

    def test_grpo_learns(self) -> None:
        self.train("grpo")

    def test_vmr_with_panw_and_mp_learns(self) -> None:
        self.train("vmr+panw+mp", split="half", prefix_updates=2, suffix_updates=1)

    def train(self, recipe: str, **options: Any) -> None:
        """A few updates: weights move, and every number that is logged is finite."""
        policy = self.make_policy()
        before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
        envs = VARTextVectorEnv(
            2,
            world=FixedPrompts(self.prompts, policy.tokenizer.image_size),  # type: ignore[arg-type]
            tokenizer=policy.tokenizer,
            reward=TopHalf(),
        )
        common = {"group_size": 2, "prompts_per_update": 2, "learning_rate": 1e-3, "seed": 0, "device": "cpu"}
        agent = recipes.make(recipe, envs, policy, **common, **options)
        agent.set_logger(logger := Logger(None, []))
        while agent.n_updates < self.updates:
            agent.learn(1, log_interval=2**31, reset_num_timesteps=False)  # so that the numbers stay to be seen
            wrong = {name: value for name, value in logger.name_to_value.items() if not np.isfinite(value)}
            assert not wrong, f"after {agent.n_updates} updates: {wrong}"
        still = [name for name, weight in policy.named_parameters() if torch.equal(weight, before[name])]
        frozen = {name for name, weight in policy.named_parameters() if not weight.requires_grad}
        frozen |= {*policy.temperature_parameters}  # by the agents' default
        assert set(still) <= frozen, f"{recipe} left {still} as they were"


class TokenizerContract:
    """What every visual tokenizer has to satisfy."""

    def make_tokenizer(self) -> VisualTokenizer:
        """A small tokenizer, frozen and in eval mode, the same at every call."""
        raise NotImplementedError

    def canvases(self, tokenizer: VisualTokenizer, grids: Sequence[Tensor]) -> list[Tensor]:
        """The canvas before each grid and after the last."""
        found = [tokenizer.blank(len(grids[0]))]
        for t, grid in enumerate(grids):
            found.append(tokenizer.write(t, found[-1], grid))
        return found

    def test_encode_gives_grids_of_the_schedule(self) -> None:
        tokenizer = self.make_tokenizer()
        side = tokenizer.image_size
        images = torch.randint(256, (2, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        grids = tokenizer.encode(images)
        assert [grid.shape for grid in grids] == [(2, n, tokenizer.depth) for n in tokenizer.schedule.sizes]
        for grid in grids:
            assert grid.dtype == torch.int64 and grid.min() >= 0 and grid.max() < tokenizer.vocab_size

    def test_decode_gives_images_at_any_scale(self) -> None:
        tokenizer = self.make_tokenizer()
        canvases = self.canvases(tokenizer, random_grids(tokenizer, 2))
        for canvas in (canvases[0], canvases[len(canvases) // 2], canvases[-1]):
            images = tokenizer.decode(canvas)
            assert images.shape == (2, tokenizer.image_size, tokenizer.image_size, 3)
            assert images.dtype == torch.uint8
        assert torch.equal(tokenizer.decode(canvases[-1]), tokenizer.decode(canvases[-1]))
        assert not torch.equal(tokenizer.decode(canvases[0]), tokenizer.decode(canvases[-1])), "grids leave no trace"

    def test_write_leaves_the_canvas_before_it_alone(self) -> None:
        """Forks of an episode share their canvas."""
        tokenizer = self.make_tokenizer()
        canvas = tokenizer.blank(2)
        for t, grid in enumerate(random_grids(tokenizer, 2)):
            kept, following = canvas.clone(), tokenizer.write(t, canvas, grid)
            assert torch.equal(canvas, kept), f"write({t}, ...) changed its canvas in place"
            assert torch.equal(following, tokenizer.write(t, canvas, grid)), f"write({t}, ...) is not deterministic"
            canvas = following

    def test_rows_do_not_mix(self) -> None:
        tokenizer = self.make_tokenizer()
        grids = random_grids(tokenizer, 3)
        together = self.canvases(tokenizer, grids)[-1]
        alone = self.canvases(tokenizer, [grid[1:2] for grid in grids])[-1]
        torch.testing.assert_close(alone[0], together[1])

    def test_read_all_is_read_after_every_write(self) -> None:
        tokenizer = self.make_tokenizer()
        grids = random_grids(tokenizer, 2)
        length = len(tokenizer.schedule)
        canvases = self.canvases(tokenizer, grids)
        for until in {0, length // 2, length - 1}:
            features = tokenizer.read_all(grids[:until], until, 2)
            assert len(features) == until + 1
            for t, found in enumerate(features):
                assert found.shape == (2, tokenizer.schedule.sizes[t], tokenizer.channels)
                torch.testing.assert_close(found, tokenizer.read(t, canvases[t]))

    def test_embed_tells_tokens_apart(self) -> None:
        tokenizer = self.make_tokenizer()
        for t in {0, len(tokenizer.schedule) - 1}:
            shape = (1, tokenizer.schedule.sizes[t], tokenizer.depth)
            low, high = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.int64)
            assert tokenizer.embed(t, low).shape[:2] == shape[:2]
            assert not torch.equal(tokenizer.embed(t, low), tokenizer.embed(t, high))

    def test_distances_are_those_of_the_embedding(self) -> None:
        tokenizer = self.make_tokenizer()
        try:
            distances = tokenizer.code_distances()
        except NotImplementedError as error:
            raise unittest.SkipTest(str(error)) from None
        last = len(tokenizer.schedule) - 1
        one, two = (random_grids(tokenizer, 1, seed)[last] for seed in (1, 2))  # (1, n, D)
        apart = (tokenizer.embed(last, one) - tokenizer.embed(last, two)).square().sum(-1)  # (1, n)
        torch.testing.assert_close(distances[one, two].sum(-1), apart, atol=1e-4, rtol=1e-4)
        assert torch.equal(distances, distances.T) and not distances.diagonal().any()

    def test_save_and_load(self) -> None:
        tokenizer = self.make_tokenizer()
        canvas = self.canvases(tokenizer, random_grids(tokenizer, 2))[-1]
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder) / "tokenizer.safetensors")
            loaded = type(tokenizer).load(Path(folder) / "tokenizer.safetensors")
        assert loaded.schedule == tokenizer.schedule and loaded.depth == tokenizer.depth
        assert torch.equal(loaded.decode(canvas), tokenizer.decode(canvas))
        assert not any(weight.requires_grad for weight in loaded.parameters()), "load() freezes the tokenizer"


# What the contract is tried on ---------------------------------------------------------------------------------------


def random_grids(tokenizer: VisualTokenizer, batch: int, seed: int = 0) -> list[Tensor]:
    """T grids of tokens drawn uniformly, int64 ``(batch, n_t, D)``."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, n, tokenizer.depth) for n in tokenizer.schedule.sizes]
    return [torch.randint(tokenizer.vocab_size, size, generator=generator) for size in sizes]


@torch.no_grad()
def cached_logits(policy: Policy, cache: Any, grids: Sequence[Tensor], steps: range) -> Tensor:
    """Logits of the grids in ``steps``, ``(B, n, D, V)``, by `Policy.step` from a cache that has seen those before."""
    tokenizer, canvas, logits = policy.tokenizer, policy.tokenizer.blank(len(grids[0])), []
    for t in range(steps.stop):
        if t >= steps.start:
            out, cache = policy.step(cache, t, tokenizer.read(t, canvas), grids[t - 1] if t else None)
            logits.append(out)
        canvas = tokenizer.write(t, canvas, grids[t])
    return torch.cat(logits, 1)


class FixedPrompts:
    """A world of a few prompts, drawn at random."""

    def __init__(self, prompts: Sequence[str], size: int) -> None:
        self.prompts, self.size = list(prompts), size
        self.max_prompt_bytes = max(len(prompt.encode()) for prompt in prompts)

    def sample(self, rng: np.random.Generator) -> Scene:
        return Scene(str(rng.choice(self.prompts)), ("A",), size=self.size)


class TopHalf(Reward):
    """How bright the upper half of the image is, 0 to 1; claims to have read a word there, which is MP's region."""

    name = "top_half"

    def score(self, images: np.ndarray, scenes: Sequence[HasWords]) -> RewardOutput:
        side, count = images.shape[1], len(images)
        scores = images[:, : side // 2].mean((1, 2, 3), dtype=np.float32) / 255
        box = np.array([[0, 0, side, side // 2]], np.float32)
        return RewardOutput(scores, words=[["A"]] * count, confidences=[[1.0]] * count, regions=[box] * count)
