"""A Qwen2 decoder as a policy: the contract, padding, and what transformers and peft expect of a model of theirs."""

import json

import pytest
import torch
from test_examples import run as run_script
from test_policies import small_tokenizer
from tiny import weights_of
from tokenizers import AddedToken, ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from agents.policies import load_policy
from agents.policies.lora import add_lora, merge_lora
from agents.policies.qwen import QwenPolicy, byte_level
from agents.policies.qwen_model import QwenVARConfig, QwenVARModel, new_model, visual_options
from agents.testing import PolicyContract, cached_logits, random_grids
from var_env import ScaleSchedule, Tokenizer
from var_env.tokenizers.bits import BitTokenizer
from var_env.tokenizers.raster import RasterTokenizer

PROMPTS = list(PolicyContract.prompts)
EVERY = range(3)
DECODER = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # two queries share a key, as in the public checkpoints
}


def tiny(tokenizer, **options):
    """Random weights; a larger scale than at birth, so that prompts and grids make a difference."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = QwenPolicy.small(tokenizer, **{"width": 32, "layers": 2, "heads": 2, "precision": "fp32"} | options)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(4.0 if weight.ndim > 1 else 1.0)
    return policy.eval()


def save_decoder(folder, **changes):
    """A checkpoint as the public ones are: a causal language model in bf16, and its text tokenizer of 266 tokens."""
    text = ByteLevelBPETokenizer()
    text.train_from_iterator(["a sign that says " * 4], vocab_size=265, min_frequency=2, show_progress=False)
    text.add_special_tokens([AddedToken("<|endoftext|>")])
    PreTrainedTokenizerFast(tokenizer_object=text._tokenizer, pad_token="<|endoftext|>").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**DECODER | changes)).bfloat16()
    model.save_pretrained(folder)
    return model.model


@pytest.fixture
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def inputs(tokenizer):
    """Of the model itself: prompts, and the features of all scales."""
    policy = tiny(tokenizer)
    features = torch.cat(tokenizer.read_all(random_grids(tokenizer, 3), 2, 3), 1)
    return {**policy.encode_prompts(PROMPTS)._asdict(), "features": features}


def run(model, inputs):
    return model(inputs["ids"], inputs["mask"], inputs["features"])


class TestContract(PolicyContract):
    def make_policy(self):
        return tiny(small_tokenizer())


class TestSharedKeysContract(PolicyContract):
    """Fewer keys than queries, eager attention, and gradient checkpointing under an agent."""

    def make_policy(self):
        tokenizer = small_tokenizer()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = QwenVARConfig(DECODER | {"initializer_range": 0.08}, **visual_options(tokenizer))
            model = new_model(config, "eager")
        return QwenPolicy(tokenizer, model, precision="fp32", gradient_checkpointing=True).eval()


class TestRasterContract(PolicyContract):
    def make_policy(self):
        return tiny(RasterTokenizer(small_tokenizer(((3, 3),))))


class TestBitsContract(PolicyContract):
    """Several codes a token."""

    def make_policy(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            schedule = ScaleSchedule([(1, 1), (2, 2), (4, 4)])
            return tiny(BitTokenizer(schedule, 6, width=8, blocks=1).eval().requires_grad_(False))


class TestModel:
    def test_padding_may_be_on_either_side(self, tokenizer, inputs):
        model = tiny(tokenizer).model
        expected = run(model, inputs)
        moved = dict(inputs)
        for name in ("ids", "mask"):
            rows = [row[keep] for row, keep in zip(inputs[name], inputs["mask"], strict=True)]
            moved[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right
        assert not moved["mask"][:, -1].all() and moved["mask"][:, 0].all()
        torch.testing.assert_close(run(model, moved), expected, atol=1e-4, rtol=1e-4)
        moved["ids"] = moved["ids"].masked_fill(~moved["mask"], 7)  # whatever the padding is
        torch.testing.assert_close(run(model, moved), expected, atol=1e-4, rtol=1e-4)

    def test_the_implementations_of_attention_agree(self, tokenizer, inputs):
        found = [run(tiny(tokenizer, attention=attention).model, inputs) for attention in ("sdpa", "eager")]
        torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("auto", [False, True])
    def test_save_pretrained_and_back(self, tokenizer, inputs, tmp_path, auto):
        model = tiny(tokenizer).model
        model.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert {name: getattr(config, name) for name in visual_options(tokenizer)} == visual_options(tokenizer)
        loaded = (AutoModel if auto else QwenVARModel).from_pretrained(tmp_path, attn_implementation="eager")
        assert type(loaded) is QwenVARModel and loaded.decoder.config._attn_implementation == "eager"
        kept = loaded.config.decoder.to_dict() | {"dtype": None}  # what the weights were saved in
        assert kept == model.config.decoder.to_dict() | {"dtype": None}
        found, expected = loaded.state_dict(), model.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        torch.testing.assert_close(run(loaded.eval(), inputs), run(model, inputs), atol=1e-4, rtol=1e-4)
        policy = QwenPolicy(tokenizer, loaded, precision="fp32")
        assert policy.config["attention"] == "eager"

    def test_weights_in_bf16(self, tokenizer, inputs, tmp_path):
        model = tiny(tokenizer).model
        model.save_pretrained(tmp_path)
        half = run(AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval(), inputs)
        full = run(model, inputs)
        assert half.dtype == torch.float32
        assert 0 < (half - full).abs().max() < 0.1 * full.abs().max()

    def test_gradient_checkpointing_gives_the_same_gradients(self, tokenizer):
        """In eval mode too, which agents train in, and where transformers would leave it out without a word."""
        grids, found, computed = random_grids(tokenizer, 3), [], []
        for on in (False, True):
            policy, calls = tiny(tokenizer, gradient_checkpointing=on), []
            policy.model.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            policy(policy.encode_prompts(PROMPTS), grids, EVERY).square().sum().backward()
            found.append([weight.grad for weight in policy.parameters()])
            computed.append(len(calls))
            assert not policy.training
            cond = policy.encode_prompts(PROMPTS)
            cached = cached_logits(policy, policy.begin(cond), grids, EVERY)
            torch.testing.assert_close(cached, policy(cond, grids, EVERY), atol=1e-4, rtol=1e-4)
        assert computed == [1, 2]
        for plain, checkpointed in zip(*found, strict=True):
            torch.testing.assert_close(checkpointed, plain)

    def test_peft_wraps_it(self, tokenizer, inputs):
        peft = pytest.importorskip("peft")
        model = tiny(tokenizer).model
        before = run(model, inputs)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        torch.testing.assert_close(run(wrapped, inputs), before)  # frozen weights may take other kernels
        run(wrapped, inputs).square().sum().backward()
        learned = {name for name, weight in wrapped.named_parameters() if weight.grad is not None}
        assert len(learned) == 2 * 2 * 2 and all("lora_" in name for name in learned)

    @pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "fast"])
    def test_attention_that_takes_no_mask(self, tokenizer, tmp_path, attention):
        with pytest.raises(ValueError, match=f"sdpa, eager, got '{attention}': .* block-causal"):
            tiny(tokenizer, attention=attention)
        with pytest.raises(ValueError, match=f"'{attention}'"):
            QwenPolicy.from_decoder("Qwen/Qwen2.5-0.5B", tokenizer, attention=attention)


class TestPolicy:
    def test_a_prompt_is_left_padded_bytes(self, tokenizer):
        cond = tiny(tokenizer).encode_prompts(['"É"', "", "x"])
        assert cond.mask.sum(1).tolist() == [4, 0, 1] and cond.mask[:, -1].tolist() == [True, False, True]
        assert byte_level().decode(cond.ids[0].tolist()) == '"É"'
        policy = tiny(tokenizer)
        grids = random_grids(tokenizer, 3)
        logits = policy(cond, grids, EVERY)
        torch.testing.assert_close(logits[1], policy(policy.null_cond(cond), grids, EVERY)[1], atol=1e-4, rtol=1e-4)

    def test_bf16_stays_near_fp32_and_returns_fp32(self, tokenizer):
        grids = random_grids(tokenizer, 3)
        full, half = (tiny(tokenizer, precision=p) for p in ("fp32", "bf16"))
        cond = full.encode_prompts(PROMPTS)
        a, b = (p(cond, grids, EVERY) for p in (full, half))
        assert b.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.1 * a.abs().max()
        assert half.begin(cond).past.layers[0].keys.dtype == torch.bfloat16
        torch.testing.assert_close(cached_logits(half, half.begin(cond), grids, EVERY), b, atol=0.1, rtol=0.1)

    def test_the_parts_of_forward(self, tokenizer):
        policy, grids = tiny(tokenizer), random_grids(tokenizer, 3)
        cond, steps = policy.encode_prompts(PROMPTS), range(1, 3)
        hidden = policy.hidden(cond, grids, steps)
        assert hidden.shape == (3, 20, 32)
        torch.testing.assert_close(policy.logits(hidden, steps), policy(cond, grids, steps))

    def test_a_fork_copies(self, tokenizer):
        policy = tiny(tokenizer)
        cache = policy.begin(policy.encode_prompts(PROMPTS))
        forked = policy.fork(cache, torch.tensor([0, 1, 2]))
        before = cache.past.layers[0].keys.clone()
        for old, new in zip(cache.past.layers, forked.past.layers, strict=True):
            assert torch.equal(old.keys, new.keys) and torch.equal(old.values, new.values)
            assert old.keys.data_ptr() != new.keys.data_ptr() and old.values.data_ptr() != new.values.data_ptr()
        policy.step(forked, 0, tokenizer.read(0, tokenizer.blank(3)), None)
        assert torch.equal(cache.past.layers[0].keys, before)
        assert forked.past.get_seq_length() == cache.past.get_seq_length() + 1

    def test_a_file_stands_alone(self, tokenizer, tmp_path):
        save_decoder(tmp_path / "decoder")
        policy = QwenPolicy.from_decoder(str(tmp_path / "decoder"), tokenizer, "eager", gradient_checkpointing=True)
        policy.save(tmp_path / "p.safetensors")
        loaded = load_policy(tmp_path / "p.safetensors", tokenizer)
        assert type(loaded) is QwenPolicy and loaded.config == policy.config
        assert loaded.model.decoder.gradient_checkpointing and loaded.model.config._attn_implementation == "eager"
        assert torch.equal(loaded.encode_prompts(PROMPTS).ids, policy.encode_prompts(PROMPTS).ids)
        for name, weight in policy.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight)
        json.dumps(policy.config)

    def test_wrong_options(self, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="'fp16'"):
            tiny(tokenizer, precision="fp16")
        model = tiny(tokenizer).model
        with pytest.raises(ValueError, match=r"its grids is \[\[1, 1\], \[2, 2\], \[4, 4\]\], here \[\[1, 1\]"):
            QwenPolicy(small_tokenizer(((1, 1), (4, 4))), model)
        raster = RasterTokenizer(small_tokenizer(((3, 3),)))
        model.config.grids = [[1, 1]] * 9
        with pytest.raises(ValueError, match=r"its canvas is None, here \[3, 3\]"):
            QwenPolicy(raster, model)
        save_decoder(tmp_path)
        with pytest.raises(ValueError, match=r"has \d+ tokens and the decoder knows 256"):
            tiny(tokenizer, text=(tmp_path / "tokenizer.json").read_text())
        with pytest.raises(FileNotFoundError, match=r"vartext pretrain policy --policy qwen"):
            QwenPolicy.load(None, tokenizer)


class TestLora:
    def test_only_adapters_learn_and_they_are_saved(self, tokenizer, tmp_path):
        pytest.importorskip("peft")
        policy, grids = tiny(tokenizer), random_grids(tokenizer, 3)
        cond = policy.encode_prompts(PROMPTS)
        before = policy(cond, grids, EVERY)
        add_lora(policy, r=2)
        torch.testing.assert_close(policy(cond, grids, EVERY), before)  # frozen weights may take other kernels
        policy(cond, grids, EVERY).square().sum().backward()
        learned = {name for name, weight in policy.named_parameters() if weight.grad is not None}
        assert all("lora_" in name for name in learned)
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in learned} == set(QwenPolicy.lora_targets)
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        adapted = policy(cond, grids, EVERY)
        assert (adapted - before).abs().max() > 1e-3
        policy.save(tmp_path / "p.safetensors")
        loaded = load_policy(tmp_path / "p.safetensors", tokenizer).eval()
        assert torch.equal(loaded(cond, grids, EVERY), adapted)
        trained = [{n for n, w in p.named_parameters() if w.requires_grad} for p in (loaded, policy)]
        assert trained[0] == trained[1]
        torch.testing.assert_close(merge_lora(policy)(cond, grids, EVERY), adapted, atol=1e-3, rtol=1e-3)


class TestFromDecoder:
    def test_weights_and_words_are_the_checkpoints(self, tokenizer, tmp_path):
        decoder = save_decoder(tmp_path)
        policy = QwenPolicy.from_decoder(str(tmp_path), tokenizer, precision="fp32").eval()
        found = weights_of(policy.model.decoder)
        for name, weight in decoder.named_parameters():
            assert found[name].dtype == torch.float32 and torch.equal(found[name], weight.float())
        ids = policy.encode_prompts(["a sign", "a sign that says"])
        assert ids.mask.sum(1).tolist()[0] < len("a sign")  # pieces of several letters
        # What the decoder makes of a prompt is what it always made of it.
        keys = policy.begin(ids).past.layers[1].keys[1, :, :-1]
        expected = decoder.float()(ids.ids[1:], use_cache=True).past_key_values.layers[1].keys[0]
        torch.testing.assert_close(keys, expected, atol=1e-4, rtol=1e-4)

    def test_no_such_checkpoint(self, tokenizer, tmp_path):
        with pytest.raises(OSError, match=r"Qwen2 checkpoint .*the folder needs config\.json, the weights and tokeniz"):
            QwenPolicy.from_decoder(str(tmp_path), tokenizer)

    def test_weights_are_missing(self, tokenizer, tmp_path):
        from safetensors.torch import load_file, save_file

        save_decoder(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(OSError, match=r"lacks 1 weights, such as norm\.weight"):
            QwenPolicy.from_decoder(str(tmp_path), tokenizer)

    def test_another_kind_of_model(self, tokenizer, tmp_path):
        save_decoder(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
        with pytest.raises(ValueError, match="holds a llama: give a checkpoint of Qwen2"):
            QwenPolicy.from_decoder(str(tmp_path), tokenizer)


def test_pretraining(tmp_path):
    """On an untrained tokenizer there is little to learn, but there is something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Tokenizer(vocab_size=64, channels=4, width=8, blocks=1).save(tmp_path / "tokenizer.safetensors")
    options = ["--policy", "qwen", "--out", tmp_path, "--device", "cpu", "--width", 32, "--layers", 1, "--heads", 2]
    printed = run_script("pretrain", "policy", *options, "--batch", 4, "--policy-steps", 40, "--log-every", 20)
    losses = [float(line.split("  loss ")[1].split()[0]) for line in printed.splitlines()]
    assert len(losses) == 2 and losses[1] < losses[0] - 0.1
    policy = load_policy(tmp_path / "policy.safetensors", Tokenizer.load(tmp_path / "tokenizer.safetensors"))
    assert isinstance(policy, QwenPolicy)
