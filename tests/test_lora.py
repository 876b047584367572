import sys

import pytest
import torch
from test_save_load import optimizer_tensors, same
from tiny import STEPS_A_ROLLOUT, tiny_agent, tiny_envs, tiny_policy, weights_of
from torch import nn

from agents import GRPO
from agents.policies.lora import add_lora, has_lora, merge_lora
from agents.policies.var_text import VARTextPolicy

pytest.importorskip("peft")

LORA = {"r": 2, "lora_alpha": 4}
OPTIONS = {"lora": LORA, "kl_coef": 0.1, "learning_rate": 1e-2}


def logits(policy):
    cond = policy.encode_prompts(['a sign that says "HI"', 'a door with "NO" on it'])
    generator = torch.Generator().manual_seed(0)
    grids = [torch.randint(policy.tokenizer.vocab_size, (2, n, 1), generator=generator) for n in policy.schedule.sizes]
    with torch.no_grad():
        return policy(cond, grids, range(len(grids)))


def randomise(policy):
    """Adapters that do something."""
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))


@pytest.fixture
def adapted(tokenizer):
    policy = tiny_policy(tokenizer)
    add_lora(policy, **LORA)
    randomise(policy)
    return policy


class TestAddLora:
    def test_new_adapters_change_nothing(self, tokenizer):
        policy = tiny_policy(tokenizer)
        before = logits(policy)
        add_lora(policy, **LORA)
        # The weights are frozen now: attention may take another kernel, which rounds differently.
        assert has_lora(policy)
        torch.testing.assert_close(logits(policy), before)

    def test_a_layer_is_the_formula(self, tokenizer):
        policy = tiny_policy(tokenizer)
        weight = policy.blocks[0].qkv.weight.detach().clone()
        add_lora(policy, r=2, lora_alpha=6)
        randomise(policy)
        layer = policy.blocks[0].qkv
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (2, width), (3 width, 2)
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), x @ (weight + 6 / 2 * b @ a).T, atol=1e-4, rtol=1e-4)

    def test_only_adapters_and_temperatures_are_trained(self, adapted):
        trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
        assert "sharpness" in trained and all("lora_" in name for name in trained - {"sharpness"})
        layers = {name.split(".lora_")[0].rpartition(".")[2] for name in trained - {"sharpness"}}
        assert layers == set(VARTextPolicy.lora_targets)

    def test_targets_can_be_chosen(self, tokenizer):
        policy = tiny_policy(tokenizer)
        add_lora(policy, target_modules=["head", "blocks.0.qkv"])
        adapters = {name.split(".lora_")[0] for name, _ in policy.named_parameters() if "lora_" in name}
        assert adapters == {"head", "blocks.0.qkv"}

    def test_the_seed_makes_the_adapters_and_touches_nothing_else(self, tokenizer):
        state, found = torch.get_rng_state(), []
        for seed in (0, 0, 1):
            policy = tiny_policy(tokenizer)
            add_lora(policy, seed=seed)
            found.append(weights_of(policy))
        assert same(found[0], found[1]) and not same(found[0], found[2])
        assert torch.equal(torch.get_rng_state(), state)

    def test_both_paths_use_them(self, adapted):
        cond = adapted.encode_prompts(['a sign that says "HI"'])
        canvas, grids, cache = adapted.tokenizer.blank(1), [], adapted.begin(cond)
        with torch.no_grad():
            for t, size in enumerate(adapted.schedule.sizes):
                grid = torch.arange(size)[None, :, None]
                features = adapted.tokenizer.read(t, canvas)
                cached, cache = adapted.step(cache, t, features, grids[-1] if grids else None)
                grids.append(grid)
                canvas = adapted.tokenizer.write(t, canvas, grid)
                torch.testing.assert_close(cached, adapted(cond, grids, range(t, t + 1)), atol=1e-4, rtol=1e-4)

    def test_a_model_of_the_transformers_library(self):
        from transformers import AutoModel, Qwen2Config

        config = Qwen2Config(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        model = AutoModel.from_config(config).eval()
        tokens = torch.arange(4)[None]
        before = model(tokens).last_hidden_state
        add_lora(model, r=2, target_modules=["q_proj", "v_proj"])
        torch.testing.assert_close(model(tokens).last_hidden_state, before)  # frozen weights may take other kernels
        model(tokens).last_hidden_state.sum().backward()
        learned = {name for name, weight in model.named_parameters() if weight.grad is not None}
        assert len(learned) == 4 and all("lora_" in name for name in learned)
        randomise(model)
        merged = merge_lora(model)
        assert not has_lora(merged) and not any("lora_" in name for name, _ in merged.named_parameters())
        torch.testing.assert_close(merged(tokens).last_hidden_state, model(tokens).last_hidden_state)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target_modules": ["qkv", "q_proj"]}, "'q_proj', but VARTextPolicy's linear layers are .*mlp_in.* qkv"),
            ({"target_modules": ["norm1"]}, "'norm1'"),
            ({"target_modules": []}, "name the layers .* target_modules"),
            ({"r": 0}, "r.* positive .*0"),
        ],
    )
    def test_bad_options(self, tokenizer, options, message):
        policy = tiny_policy(tokenizer)
        before = weights_of(policy)
        with pytest.raises(ValueError, match=message):
            add_lora(policy, **options)
        assert same(weights_of(policy), before) and "lora" not in policy.config

    def test_a_module_without_a_default_needs_names(self):
        with pytest.raises(ValueError, match="target_modules: Sequential has 0, 1"):
            add_lora(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))

    def test_not_twice(self, adapted):
        with pytest.raises(ValueError, match="adapters already"):
            add_lora(adapted)

    def test_without_peft(self, tokenizer, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r'pip install "vartext\[lora\]"'):
            add_lora(tiny_policy(tokenizer))


class TestFiles:
    def test_a_policy_with_adapters(self, adapted, tokenizer, tmp_path):
        adapted.save(tmp_path / "policy.safetensors")
        loaded = VARTextPolicy.load(tmp_path / "policy.safetensors", tokenizer)
        assert loaded.config == adapted.config and loaded.config["lora"]["r"] == 2
        assert same(weights_of(loaded), weights_of(adapted)) and torch.equal(logits(loaded), logits(adapted))
        trained = [{n for n, w in policy.named_parameters() if w.requires_grad} for policy in (loaded, adapted)]
        assert trained[0] == trained[1]

    def test_merged_is_a_plain_policy_with_the_same_logits(self, adapted, tokenizer, tmp_path):
        before = weights_of(adapted)
        merged = merge_lora(adapted)
        torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-3, rtol=1e-4)
        assert (logits(merged) - logits(tiny_policy(tokenizer))).abs().max() > 0.1  # the adapters do something
        assert same(weights_of(adapted), before) and has_lora(adapted)
        plain = tiny_policy(tokenizer)
        assert merged.state_dict().keys() == plain.state_dict().keys() and merged.config == plain.config
        assert not has_lora(merged) and merged.tokenizer is tokenizer
        assert all(weight.requires_grad for weight in merged.parameters())
        merged.save(tmp_path / "policy.safetensors")
        loaded = VARTextPolicy.load(tmp_path / "policy.safetensors", tokenizer)
        assert torch.equal(logits(loaded), logits(merged))
        with pytest.raises(ValueError, match="no adapters"):
            merge_lora(merged)


class TestAgent:
    def test_weights_stay_and_adapters_learn(self, parts):
        agent = tiny_agent(parts, **OPTIONS)
        before = weights_of(agent.policy)
        agent.learn(2 * STEPS_A_ROLLOUT)
        moved = {name for name, weight in weights_of(agent.policy).items() if not torch.equal(weight, before[name])}
        trained = {name for name, weight in agent.policy.named_parameters() if weight.requires_grad}
        assert moved == trained - {"sharpness"}  # the learned temperatures are frozen, unless temperature_lr says else
        assert {name for name, weight in agent.policy.named_parameters() if weight.grad is not None} == trained

    def test_the_reference_is_the_policy_without_adapters(self, parts):
        agent = tiny_agent(parts, **OPTIONS)
        plain = tiny_policy(parts["tokenizer"])
        agent.learn(STEPS_A_ROLLOUT)
        assert torch.equal(logits(agent.reference), logits(plain))
        assert not torch.equal(logits(agent.policy), logits(plain))

    def test_resume_is_bit_for_bit_the_uninterrupted_run(self, parts, tmp_path):
        options = OPTIONS | {"ema_decay": 0.5, "epochs": 2}
        whole = tiny_agent(parts, **options).learn(2 * STEPS_A_ROLLOUT)
        tiny_agent(parts, **options).learn(STEPS_A_ROLLOUT).save(tmp_path / "agent")
        resumed = GRPO.load(tmp_path / "agent", env=tiny_envs(parts), device="cpu")
        assert resumed.policy.config["lora"]["r"] == 2
        resumed.learn(STEPS_A_ROLLOUT, reset_num_timesteps=False)
        for name in ("policy", "reference", "ema"):
            assert same(weights_of(getattr(resumed, name)), weights_of(getattr(whole, name)))
        assert same(optimizer_tensors(resumed), optimizer_tensors(whole))

    def test_a_policy_that_brings_adapters(self, parts, adapted):
        agent = GRPO(adapted, tiny_envs(parts), group_size=4, prompts_per_update=2, seed=0, device="cpu")
        before = weights_of(agent.policy)
        agent.learn(STEPS_A_ROLLOUT)
        assert torch.equal(agent.policy.head.weight, before["head.weight"])
        with pytest.raises(ValueError, match="adapters already: leave out lora="):
            GRPO(adapted, tiny_envs(parts), prompts_per_update=2, device="cpu", lora=LORA)

    def test_cannot_be_changed_on_loading(self, parts, tmp_path):
        tiny_agent(parts).save(tmp_path / "agent")
        with pytest.raises(ValueError, match="unknown setting 'lora'"):
            GRPO.load(tmp_path / "agent", device="cpu", lora=LORA)
