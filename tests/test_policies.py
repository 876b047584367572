"""The default backbone: the contract of a policy, and what is its own."""

import numpy as np
import pytest
import torch
from tiny import tiny_policy

from agents.policies import load_policy
from agents.policies.base import Policy
from agents.policies.var_text import MAX_PLACE, START, VARTextPolicy, byte_features
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
