"""The default backbone: the contract of a policy, and what is its own."""

import numpy as np
import pytest
import torch
from tiny import assert_same, tiny_policy

from agents.policies import load_policy, var_text
from agents.policies.base import Policy
from agents.policies.var_text import MAX_PLACE, START, VARTextPolicy, byte_features, distinct
from agents.testing import PolicyContract, cached_logits, random_grids
from var_env import ScaleSchedule, Tokenizer
from var_env.scenes import MAX_PROMPT_BYTES
from var_env.tokenizers.raster import RasterTokenizer

PROMPTS = list(PolicyContract.prompts)
EVERY = range(3)


def small_tokenizer(grids=((1, 1), (2, 2), (4, 4)), seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        schedule = ScaleSchedule(grids, patch=64 // grids[-1][0])
        return Tokenizer(schedule, vocab_size=32, channels=4, width=8, blocks=1).eval().requires_grad_(False)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


class TestVARTextContract(PolicyContract):
    def make_policy(self):
        return tiny_policy(small_tokenizer())


class TestOwnScaleContract(PolicyContract):
    """Switti's attention: earlier grids through the canvas alone."""

    def make_policy(self):
        return tiny_policy(small_tokenizer(), attention="own_scale")

    def test_nothing_is_cached(self):
        policy, cond, _ = self.start()
        assert policy.begin(cond).keys.numel() == 0


class TestRasterContract(PolicyContract):
    """Every token its own step."""

    def make_policy(self):
        return tiny_policy(RasterTokenizer(small_tokenizer(((3, 3),))))


def test_a_file_knows_its_class(tmp_path):
    tokenizer = small_tokenizer()
    policy = tiny_policy(tokenizer)
    policy.save(tmp_path / "p.safetensors")
    loaded = load_policy(tmp_path / "p.safetensors", tokenizer)
    assert type(loaded) is VARTextPolicy

    class OfAnotherProject(VARTextPolicy):
        pass

    own = OfAnotherProject(tokenizer, width=32, layers=1, heads=2)
    own.save(tmp_path / "own.safetensors")
    assert type(load_policy(tmp_path / "own.safetensors", tokenizer)) is OfAnotherProject
    tokenizer.save(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=r"holds a tokenizer and no policy: give it as --tokenizer"):
        load_policy(tmp_path / "t.safetensors")


def test_what_a_policy_need_not_have():
    with pytest.raises(NotImplementedError, match="hidden"):
        Policy.hidden(tiny_policy(small_tokenizer()), None, [], EVERY)


class TestVARText:
    def test_byte_features_count_words_and_letters(self):
        data, word, place = byte_features('"AB" or "XYZ"')
        assert data.tolist() == [START, *b'"AB" or "XYZ"']
        assert word.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 2, 2, 2, 0]
        inside = [p - MAX_PLACE for p in place if p]
        assert inside == [-1, 1, -2, 0, 2]  # half letters from the middle

    def test_byte_features_hold_for_odd_prompts(self):
        for prompt in ['"', '""', "", '"' * 9, '"É"', '"' + "W" * 100 + '"', ' "A"' * 20]:
            rows = byte_features(prompt)
            assert rows.shape == (3, len(prompt.encode()) + 1)
            assert rows[1].max() <= 8 and rows[2].min() >= 0 and rows[2].max() <= 2 * MAX_PLACE

    def test_too_long_a_prompt(self, tokenizer):
        with pytest.raises(ValueError, match=f"at most {MAX_PROMPT_BYTES} fit"):
            tiny_policy(tokenizer).encode_prompts(["x" * 500])

    def test_longer_prompts(self, tokenizer):
        policy = tiny_policy(tokenizer, prompt_bytes=600)
        assert policy.encode_prompts(["x" * 500]).bytes.shape == (1, 501)
        with pytest.raises(ValueError, match="at most 600 fit"):
            policy.encode_prompts(["x" * 601])

    def test_bf16_stays_near_fp32_and_returns_fp32(self, tokenizer):
        grids = random_grids(tokenizer, 3)
        full, half = (tiny_policy(tokenizer, precision=p) for p in ("fp32", "bf16"))
        a, b = (p(p.encode_prompts(PROMPTS), grids, EVERY) for p in (full, half))
        assert b.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()

    def test_unknown_precision(self, tokenizer):
        with pytest.raises(ValueError, match="'fp16'"):
            VARTextPolicy(tokenizer, precision="fp16")

    def test_unknown_attention(self, tokenizer):
        with pytest.raises(ValueError, match="earlier_scales, own_scale, got 'causal'"):
            VARTextPolicy(tokenizer, attention="causal")

    def test_guidance_without_a_null_prompt_is_refused(self, tokenizer, tmp_path):
        tiny_policy(tokenizer, null_prompt=False).save(tmp_path / "policy.safetensors")
        policy = VARTextPolicy.load(tmp_path / "policy.safetensors", tokenizer)
        with pytest.raises(ValueError, match=r"never seen an empty prompt .* leave guidance at 1, or pretrain"):
            policy.null_cond(policy.encode_prompts(["a"]))

    def test_weights_of_another_shape(self, tokenizer, tmp_path):
        from safetensors.torch import load_file, save_file

        path = tmp_path / "p.safetensors"
        tiny_policy(tokenizer).save(path)
        weights = load_file(path) | {"head.weight": torch.zeros(3, 3)}
        save_file(weights, path, metadata={"config": '{"width": 32, "layers": 1, "heads": 2}'})
        with pytest.raises(ValueError, match=r"(?s)do not fit .*head\.weight"):
            VARTextPolicy.load(path, tokenizer)

    def test_missing_weights(self, tokenizer, tmp_path):
        with pytest.raises(FileNotFoundError, match="vartext pretrain policy"):
            VARTextPolicy.load(tmp_path / "none", tokenizer)

    def test_prompt_arrays_are_not_shared_between_calls(self, tokenizer):
        policy = tiny_policy(tokenizer)
        first = policy.encode_prompts(PROMPTS[:1])
        first.bytes.zero_()
        assert np.array_equal(
            policy.encode_prompts(PROMPTS[:1]).bytes[0, 1:].numpy(), np.frombuffer(PROMPTS[0].encode(), np.uint8)
        )

    def test_sharpness_is_a_temperature_of_each_scale(self, tokenizer):
        policy = tiny_policy(tokenizer)
        grids, cond = random_grids(tokenizer, 3), policy.encode_prompts(PROMPTS)
        before = policy(cond, grids, EVERY)
        with torch.no_grad():
            policy.sharpness += torch.tensor([0.0, 0.001, -0.002])
        temperature = policy.temperatures()
        assert temperature == pytest.approx([1.0, np.exp(-0.3), np.exp(0.6)])
        after = policy(cond, grids, EVERY)
        for t, part in enumerate(policy.schedule.slices):
            close(after[:, part] * temperature[t], before[:, part])
        close(policy(cond, grids, range(2, 3)), after[:, 5:])
        close(cached_logits(policy, policy.begin(cond), grids, EVERY), after)
        policy.set_temperature(0.8)
        assert policy.temperatures() == pytest.approx([0.8] * 3)


class TestRuns:
    """Attention in runs of scales, prompts once for each group: the same as one masked softmax over everything."""

    @staticmethod
    def naive(policy, cond, grids, steps):
        """Gradients and log-probabilities with every prompt encoded for itself and all scores masked."""
        tokens = policy.schedule.slices[steps[-1]].stop
        scale = torch.tensor([t for t, n in enumerate(policy.schedule.sizes) for _ in range(n)])[:tokens]
        own = policy.attention == "own_scale"
        hidden = scale[:, None] != scale if own else scale[:, None] < scale

        def attend(q, text, image, text_bias):
            k, v = (torch.cat(pair, 2) for pair in zip(text, image, strict=True))
            bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf).expand(len(q), 1, -1, -1)
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            scores = scores + torch.cat((text_bias.expand(-1, 1, tokens, -1), bias), 3)
            return scores.softmax(-1).to(q.dtype) @ v

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(var_text, "distinct", lambda cond: (cond, None))
            patch.setattr(var_text, "attend_in_runs", attend)
            patch.setattr(policy, "_runs", lambda text_bias, tokens: text_bias)
            return TestRuns.learn(policy, cond, grids, steps)

    @staticmethod
    def learn(policy, cond, grids, steps):
        policy.zero_grad()
        logp, entropy = policy.evaluate(cond, grids, steps)
        weight = torch.randn(logp.shape, generator=torch.Generator().manual_seed(0))
        ((logp + 0.1 * entropy) * weight).sum().backward()
        found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        return found | {"logp": logp.detach()}

    @pytest.mark.parametrize(
        ("grids", "steps", "options"),
        [
            (((1, 1), (2, 2), (4, 4)), range(3), {}),
            (((1, 1), (2, 2), (4, 4), (8, 8)), range(4), {}),
            (((1, 1), (2, 3), (4, 6), (8, 8), (8, 10), (10, 10)), range(6), {}),
            (((1, 1), (2, 3), (4, 6), (8, 8), (8, 10), (10, 10)), range(6), {"attention": "own_scale"}),
            (((1, 1), (2, 2), (8, 8), (10, 10)), range(3), {}),
            (((1, 1), (2, 2), (8, 8), (10, 10)), range(2, 4), {}),
            (((1, 1), (2, 2), (8, 8), (10, 10)), range(1, 3), {"attention": "own_scale"}),
            (((1, 1), (2, 2), (8, 8), (10, 10)), range(4), {"gradient_checkpointing": True}),
            ("raster", range(144), {}),
            ("raster", range(100), {}),
        ],
    )
    def test_same_gradients_as_masked_attention(self, grids, steps, options):
        tokenizer = RasterTokenizer(small_tokenizer(((12, 12),))) if grids == "raster" else small_tokenizer(grids)
        policy = tiny_policy(tokenizer, **options)
        cond = policy.encode_prompts([PROMPTS[i] for i in (1, 0, 0, 1, 0)])  # of unequal lengths and in no order
        given = random_grids(tokenizer, 5)
        expected = self.naive(policy, cond, given, steps)
        assert_same(self.learn(policy, cond, given, steps), expected, atol=1e-4, rtol=1e-4)

    def test_bf16_rounds_no_more_than_masked_attention(self):
        tokenizer = small_tokenizer(((1, 1), (2, 2), (8, 8), (10, 10)))
        policy = tiny_policy(tokenizer)
        cond, given = policy.encode_prompts([PROMPTS[0]] * 4 + [PROMPTS[1]] * 4), random_grids(tokenizer, 8)
        exact = self.learn(policy, cond, given, range(4))
        policy.precision = "bf16"
        errors = [
            sum(((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact)
            for found in (self.learn(policy, cond, given, range(4)), self.naive(policy, cond, given, range(4)))
        ]
        assert 0 < errors[0] < 1.5 * errors[1]

    def test_a_run_sees_no_scale_in_vain(self):
        policy = tiny_policy(small_tokenizer(((1, 1), (2, 2), (8, 8), (10, 10))))
        runs = policy._runs(torch.zeros(2, 1, 1, 7), 169)
        assert [(run.queries, run.seen) for run in runs] == [
            (slice(0, 69), slice(0, 69)),
            (slice(69, 169), slice(0, 169)),
        ]
        assert [tuple(run.bias.shape) for run in runs] == [(2, 1, 69, 76), (2, 1, 1, 176)]
        assert not runs[1].bias.any()

    def test_equal_prompts_are_encoded_once(self):
        policy = tiny_policy(small_tokenizer())
        cond = policy.encode_prompts([PROMPTS[i] for i in (1, 0, 1)])
        prompts, rows = distinct(cond)
        assert len(prompts.bytes) == 2
        for part, unique in zip(cond, prompts, strict=True):
            assert torch.equal(part, unique[rows.argmax(1)])
        assert distinct(policy.take(cond, torch.arange(2)))[1] is None
