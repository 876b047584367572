"""The contract of a policy. A new backbone joins by a line in `BACKBONES`."""

import numpy as np
import pytest
import torch
from tiny import tiny_policy

from agents.policies.var_text import MAX_PLACE, START, VARTextPolicy, byte_features
from var_env.scenes import MAX_PROMPT_BYTES

BACKBONES = {"var_text": tiny_policy}
PROMPTS = ['A navy sign that says "KITE" above "RUN" in white letters', '"OX" in pink on a black wall', '"A"']
EVERY = range(3)


@pytest.fixture(params=BACKBONES)
def policy(request, tokenizer):
    return BACKBONES[request.param](tokenizer)


def random_grids(policy, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    high = policy.tokenizer.vocab_size
    return [torch.randint(high, (batch, n, 1), generator=generator) for n in policy.schedule.sizes]


@torch.no_grad()
def cached_logits(policy, cache, grids, steps=EVERY):
    tokenizer, canvas, logits = policy.tokenizer, policy.tokenizer.blank(len(grids[0])), []
    for t in range(steps.stop):
        if t >= steps.start:
            out, cache = policy.step(cache, t, tokenizer.read(t, canvas), grids[t - 1] if t else None)
            logits.append(out)
        canvas = tokenizer.write(t, canvas, grids[t])
    return torch.cat(logits, 1)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_cached_equals_teacher_forced(policy):
    grids, cond = random_grids(policy), policy.encode_prompts(PROMPTS)
    logits = policy(cond, grids, EVERY)
    assert logits.shape == (3, 21, 1, 32) and logits.dtype == torch.float32
    close(cached_logits(policy, policy.begin(cond), grids), logits)


def test_padding_of_a_longer_neighbour_changes_nothing(policy):
    grids = random_grids(policy, batch=1)
    together = policy(policy.encode_prompts(PROMPTS), [grid.repeat(3, 1, 1) for grid in grids], EVERY)
    for row, prompt in enumerate(PROMPTS):
        close(policy(policy.encode_prompts([prompt]), grids, EVERY)[0], together[row])


def test_a_grid_depends_on_the_prompt_and_on_earlier_grids_only(policy):
    grids, cond = random_grids(policy), policy.encode_prompts(PROMPTS)
    logits = policy(cond, grids, EVERY)
    for t in EVERY:
        changed = [*grids[:t], (grids[t] + 1) % 32, *grids[t + 1 :]]
        difference = (policy(cond, changed, EVERY) - logits).abs().amax((2, 3))  # (B, L)
        until = policy.schedule.slices[t].stop
        assert (difference[:, :until] == 0).all()
        assert until == 21 or (difference[:, until:] > 0).any()
    assert not torch.allclose(logits[0, 0], logits[1, 0])


def test_a_range_of_steps_is_a_part_of_the_whole(policy):
    grids, cond = random_grids(policy), policy.encode_prompts(PROMPTS)
    whole = policy(cond, grids, EVERY)
    close(policy(cond, grids[:0], range(0, 1)), whole[:, :1])
    close(policy(cond, grids[:1], range(0, 2)), whole[:, :5])
    close(policy(cond, grids[:2], range(1, 3)), whole[:, 1:])


def test_evaluate_is_log_softmax_by_hand(policy):
    grids, cond = random_grids(policy), policy.encode_prompts(PROMPTS)
    logp, entropy = policy.evaluate(cond, grids, range(1, 3))
    logits = policy(cond, grids, range(1, 3)).double()
    tokens = torch.cat(grids[1:], 1)
    for b in range(3):
        for i in range(20):
            p = logits[b, i, 0].exp() / logits[b, i, 0].exp().sum()
            assert logp[b, i, 0].item() == pytest.approx(p[tokens[b, i, 0]].log().item(), abs=1e-4)
            assert entropy[b, i, 0].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)


def test_fork_equals_fresh(policy):
    grids, cond = random_grids(policy), policy.encode_prompts(PROMPTS)
    cache, canvas = policy.begin(cond), policy.tokenizer.blank(3)
    _, cache = policy.step(cache, 0, policy.tokenizer.read(0, canvas), None)
    index = torch.tensor([2, 0, 0, 1])
    forked = policy.fork(cache, index)
    mine = [grid[index] for grid in grids]
    expected = policy(policy.take(cond, index), mine, range(1, 3))
    close(cached_logits(policy, forked, mine, range(1, 3)), expected)
    close(cached_logits(policy, cache, grids, range(1, 3)), policy(cond, grids, range(1, 3)))  # the fork took a copy


def test_null_cond_forgets_the_prompt(policy):
    grids = random_grids(policy, batch=1)
    nulls = [policy(policy.null_cond(policy.encode_prompts([p])), grids, EVERY) for p in PROMPTS]
    close(nulls[0], nulls[1])


def test_gradient_reaches_every_parameter(policy):
    prompts = ['"' + "A" * 5 + '"'] * 3
    logp, _ = policy.evaluate(policy.encode_prompts(prompts), random_grids(policy), EVERY)
    logp.sum().backward()
    for name, weight in policy.named_parameters():
        assert weight.grad is not None and weight.grad.any(), name


def test_deterministic(policy):
    grids, cond = random_grids(policy), policy.encode_prompts(PROMPTS)
    assert torch.equal(policy(cond, grids, EVERY), policy(cond, grids, EVERY))


def test_save_and_load(policy, tokenizer, tmp_path):
    policy.save(tmp_path / "p.safetensors")
    loaded = type(policy).load(tmp_path / "p.safetensors", tokenizer)
    grids, cond = random_grids(policy), policy.encode_prompts(PROMPTS)
    assert torch.equal(loaded(cond, grids, EVERY), policy(cond, grids, EVERY))
    assert not any("tokenizer" in name for name in policy.state_dict())


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

    def test_bf16_stays_near_fp32_and_returns_fp32(self, tokenizer):
        grids = random_grids(tiny_policy(tokenizer))
        full, half = (tiny_policy(tokenizer, precision=p) for p in ("fp32", "bf16"))
        a, b = (p(p.encode_prompts(PROMPTS), grids, EVERY) for p in (full, half))
        assert b.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()

    def test_unknown_precision(self, tokenizer):
        with pytest.raises(ValueError, match="'fp16'"):
            VARTextPolicy(tokenizer, precision="fp16")

    def test_weights_of_another_shape(self, tokenizer, tmp_path):
        from safetensors.torch import load_file, save_file

        path = tmp_path / "p.safetensors"
        tiny_policy(tokenizer).save(path)
        weights = load_file(path) | {"head.weight": torch.zeros(3, 3)}
        save_file(weights, path, metadata={"config": '{"width": 32, "layers": 1, "heads": 2}'})
        with pytest.raises(ValueError, match=r"(?s)do not fit .*head\.weight"):
            VARTextPolicy.load(path, tokenizer)

    def test_missing_weights(self, tokenizer, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"pretrain\.py policy"):
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
        grids, cond = random_grids(policy), policy.encode_prompts(PROMPTS)
        before = policy(cond, grids, EVERY)
        with torch.no_grad():
            policy.sharpness += torch.tensor([0.0, 0.001, -0.002])
        temperature = policy.temperatures()
        assert temperature == pytest.approx([1.0, np.exp(-0.3), np.exp(0.6)])
        after = policy(cond, grids, EVERY)
        for t, part in enumerate(policy.schedule.slices):
            close(after[:, part] * temperature[t], before[:, part])
        close(policy(cond, grids, range(2, 3)), after[:, 5:])
        close(cached_logits(policy, policy.begin(cond), grids), after)
