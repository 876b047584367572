"""Janus-Pro: a small model of the real classes with random weights, against transformers' own generation."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import randomise
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    PreTrainedTokenizerFast,
)

from agents import Decoding, load, make
from agents.policies import load_policy
from agents.policies.janus import TEMPLATE, JanusPolicy
from agents.policies.lora import add_lora
from agents.rollout import collect
from agents.testing import FixedPrompts, PolicyContract, TokenizerContract, TopHalf, random_grids
from var_env import ScaleSchedule, VARTextVectorEnv, load_tokenizer
from var_env.scenes import Scene
from var_env.tokenizers.janus_vq import JanusTokenizer

PROMPTS = list(PolicyContract.prompts)
MARKS = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_placeholder>",
}
EVERY = range(16)


def save_tiny_janus(folder):
    """Janus-Pro with 2 layers and 48 codes, for images of 16 pixels: 4 x 4 tokens of 4 pixels."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEMPLATE, *PROMPTS], vocab_size=300, show_progress=False)
    bpe.add_special_tokens(list(MARKS.values()))
    bos = bpe.token_to_id("<bos>")
    bpe._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    names = {name: MARKS[name] for name in ("boi_token", "eoi_token", "image_token")}
    text = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        extra_special_tokens=names,
        padding_side="left",
        **{name: MARKS[name] for name in ("bos_token", "eos_token", "pad_token")},
    )
    JanusProcessor(JanusImageProcessor(), text).save_pretrained(folder)
    config = JanusConfig(
        text_config={
            "vocab_size": len(text) + 3,  # more than the tokenizer has, as in the public model
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": text.pad_token_id,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "projection_dim": 32,
            "num_image_tokens": 16,
        },
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 48,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise(JanusForConditionalGeneration(config), 0.2)
    model.generation_config.update(
        bos_token_id=text.bos_token_id,
        pad_token_id=text.pad_token_id,
        eos_token_id=text.eos_token_id,
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def public(checkpoint):
    """The model and the processor as transformers loads them."""
    return JanusForConditionalGeneration.from_pretrained(checkpoint).eval(), JanusProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def shared(checkpoint):
    return JanusPolicy.load_public(checkpoint, device="cpu", precision="fp32")


@pytest.fixture
def policy(shared):
    return copy.deepcopy(shared)


def inputs(processor, prompts):
    """What transformers' generation starts from."""
    chats = [TEMPLATE.removesuffix("<begin_of_image>").replace("{prompt}", prompt) for prompt in prompts]
    return processor(text=chats, generation_mode="image", padding=True, return_tensors="pt")


class TestPolicyContract(PolicyContract):
    @pytest.fixture(autouse=True)
    def fresh(self, policy):
        self.made = policy

    def make_policy(self):
        return copy.deepcopy(self.made)

    def test_null_cond_forgets_the_prompt(self):
        """All but its length, which Janus's own guidance keeps."""
        policy, _, grids = self.start()
        one, words = [grid[:1] for grid in grids], ['"7 8" in red', '"8 7" in red']
        conds = [policy.encode_prompts([prompt]) for prompt in words]
        assert conds[0].ids.shape == conds[1].ids.shape and not torch.equal(conds[0].ids, conds[1].ids)
        nulls = [policy(policy.null_cond(cond), one, EVERY) for cond in conds]
        assert torch.equal(nulls[0], nulls[1])
        assert (nulls[0] - policy(conds[0], one, EVERY)).abs().max() > self.tolerance


class TestTokenizerContract(TokenizerContract):
    @pytest.fixture(autouse=True)
    def fresh(self, shared):
        self.made = shared.tokenizer

    def make_tokenizer(self):
        return self.made


def test_prompts_are_tokens_as_the_processor_makes_them(public, policy):
    expected, cond = inputs(public[1], PROMPTS), policy.encode_prompts(PROMPTS)
    assert torch.equal(cond.ids, expected["input_ids"])
    assert torch.equal(cond.mask, expected["attention_mask"].bool())
    assert not cond.mask[2, 0] and cond.mask[0].all(), "padding is on the left"


@pytest.mark.parametrize("guidance", [1.5, 5.0])
def test_greedy_images_are_those_of_transformers(public, policy, guidance):
    model, processor = public
    begin = processor.tokenizer.convert_tokens_to_ids("<begin_of_image>")
    model.generation_config.generation_kwargs = {"boi_token_id": begin}
    expected = model.generate(
        **inputs(processor, PROMPTS), generation_mode="image", do_sample=False, guidance_scale=guidance
    )
    envs = VARTextVectorEnv(3, world=FixedPrompts(PROMPTS, 16), tokenizer=policy.tokenizer, reward=TopHalf())
    scenes = [Scene(prompt, ("A",), size=16) for prompt in PROMPTS]
    rollout = collect(policy, envs, 1, Decoding(temperature=0.0, guidance=guidance), scenes=scenes)
    assert torch.equal(torch.cat(rollout.grids, 1).squeeze(-1), expected)
    assert len(expected.unique()) > 5
    with torch.no_grad():
        pixels = model.decode_image_tokens(expected)
    assert np.array_equal(rollout.images, ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())
    assert rollout.images.std() > 1


def test_encode_finds_the_nearest_direction(shared):
    tokenizer = shared.tokenizer
    images = torch.randint(256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        vectors = tokenizer.features(images.permute(0, 3, 1, 2) / 127.5 - 1).flatten(2).transpose(1, 2)  # (2, 16, C)
    nearest = torch.cdist(torch.nn.functional.normalize(vectors, dim=-1), tokenizer.codebook).argmin(-1)
    assert torch.equal(torch.cat(tokenizer.encode(images), 1).squeeze(-1), nearest)
    torch.testing.assert_close(tokenizer.codebook.norm(dim=1), torch.ones(48))


def test_decoding_many_images_is_decoding_each(shared):
    tokenizer = shared.tokenizer
    canvas = torch.randn(20, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    each = torch.cat([tokenizer.decode(row[None]) for row in canvas])
    assert (tokenizer.decode(canvas).int() - each.int()).abs().max() <= 1  # grey levels, from rounding


def test_a_token_is_a_step(shared):
    assert shared.schedule == ScaleSchedule.raster((4, 4), 4) and shared.tokenizer.image_size == 16
    assert JanusTokenizer({"base_channels": 32, "num_res_blocks": 1, "num_patches": 24}).image_size == 384


def test_no_part_that_answers_questions(policy):
    names = {name.partition(".")[0] for name, _ in policy.named_parameters()}
    assert names == {"language_model", "generation_embeddings", "generation_aligner", "generation_head"}


def test_files_stand_alone(policy, tmp_path):
    policy.save(tmp_path / "p.safetensors")
    policy.tokenizer.save(tmp_path / "t.safetensors")
    tokenizer = load_tokenizer(tmp_path / "t.safetensors")
    loaded = load_policy(tmp_path / "p.safetensors", tokenizer)
    assert type(loaded) is JanusPolicy and type(tokenizer) is JanusTokenizer
    cond, grids = loaded.encode_prompts(PROMPTS), random_grids(tokenizer, 3)
    assert torch.equal(loaded(cond, grids, EVERY), policy(cond, grids, EVERY))
    with pytest.raises(ValueError, match="belongs to a JanusTokenizer"):
        load_policy(tmp_path / "p.safetensors")
    with pytest.raises(FileNotFoundError, match=r"JanusPolicy\.from_pretrained"):
        JanusTokenizer.load(tmp_path / "none.safetensors")


def test_an_agent_with_adapters_comes_back(policy, tmp_path):
    envs = VARTextVectorEnv(2, world=FixedPrompts(PROMPTS, 16), tokenizer=policy.tokenizer, reward=TopHalf())
    options = {"group_size": 2, "prompts_per_update": 2, "learning_rate": 1e-2, "seed": 0, "device": "cpu"}
    agent = make("ppo", envs, policy, lora={"r": 2}, **options)
    agent.learn(64)
    agent.save(tmp_path / "agent.zip")
    again = load(tmp_path / "agent.zip", device="cpu").policy
    cond, grids = policy.encode_prompts(PROMPTS), random_grids(policy.tokenizer, 3)
    assert torch.equal(again(cond, grids, EVERY), policy(cond, grids, EVERY))
    assert all("lora" in name for name, weight in again.named_parameters() if weight.requires_grad)


def test_gradient_checkpointing_changes_no_gradient(policy, tmp_path):
    policy.config["gradient_checkpointing"] = True
    policy.save(tmp_path / "p.safetensors")
    saving = JanusPolicy.load(tmp_path / "p.safetensors", policy.tokenizer).eval()
    policy.config["gradient_checkpointing"] = False
    cond, grids = policy.encode_prompts(PROMPTS), random_grids(policy.tokenizer, 3)
    calls = []
    for model in (policy, saving):
        model.language_model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
        model.evaluate(cond, grids, EVERY)[0].sum().backward()
        assert not any(module.training for module in model.modules())
    assert len(calls) == 3, "the layers run again in the backward pass"
    for (name, plain), (_, saved) in zip(policy.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(saved.grad, plain.grad, msg=name)


def test_bfloat16(checkpoint, shared, tmp_path):
    half = JanusPolicy.load_public(checkpoint, device="cpu", dtype="bfloat16", precision="fp32")
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.language_model.rotary_emb.inv_freq, shared.language_model.rotary_emb.inv_freq)
    assert shared.tokenizer.codebook.dtype == half.tokenizer.codebook.dtype == torch.float32
    mixed = JanusPolicy.load_public(checkpoint, device="cpu", precision="bf16")
    cond, grids = shared.encode_prompts(PROMPTS), random_grids(shared.tokenizer, 3)
    exact = shared(cond, grids, EVERY)
    for policy in (half, mixed):
        logits = policy(cond, grids, EVERY)
        assert logits.dtype == torch.float32
        assert 0 < (logits - exact).abs().max() < 0.1 * exact.abs().max()
    half.save(tmp_path / "half.safetensors")
    loaded = JanusPolicy.load(tmp_path / "half.safetensors", half.tokenizer).eval()
    assert torch.equal(loaded(cond, grids, EVERY), half(cond, grids, EVERY))


def test_adapters_start_as_the_policy(policy):
    cond, grids = policy.encode_prompts(PROMPTS), random_grids(policy.tokenizer, 3)
    before = policy(cond, grids, EVERY)
    add_lora(policy)
    torch.testing.assert_close(policy(cond, grids, EVERY), before)  # frozen weights may take other kernels


def test_another_template(policy, tmp_path):
    policy.config["template"] = "{prompt}<begin_of_image>"
    policy.save(tmp_path / "p.safetensors")
    plain = JanusPolicy.load(tmp_path / "p.safetensors", policy.tokenizer)
    ids = plain.encode_prompts(["a {prompt} <x>"]).ids[0].tolist()
    assert plain.text_tokenizer.decode(ids, skip_special_tokens=False) == "<bos>a {prompt} <x><begin_of_image>"
    for wrong in ("<begin_of_image>", "{prompt}", "{prompt}<begin_of_image> "):
        policy.config["template"] = wrong
        policy.save(tmp_path / "p.safetensors")
        with pytest.raises(ValueError, match="template must hold"):
            JanusPolicy.load(tmp_path / "p.safetensors", policy.tokenizer)


def test_bad_options(checkpoint, shared, tokenizer):
    with pytest.raises(ValueError, match="'float16'"):
        JanusPolicy.load_public(checkpoint, device="cpu", dtype="float16")
    with pytest.raises(ValueError, match="'tf32'"):
        JanusPolicy.load_public(checkpoint, device="cpu", precision="tf32")
    config = {name: shared.config[name] for name in ("text_config", "text_tokenizer")}
    with pytest.raises(ValueError, match="draws with a JanusTokenizer, got a Tokenizer"):
        JanusPolicy(tokenizer, **config)


def test_no_checkpoint(tmp_path):
    with pytest.raises(OSError, match=r"the folder needs config\.json"):
        JanusPolicy.load_public(tmp_path)
