"""FoundationVision's Infinity: the contract on tiny models, the layout of the public files, and what is its own.

That logits and images are those of the public code was checked against it, on random weights.
"""

import functools
import tempfile

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from agents.policies import load_policy
from agents.policies.infinity import InfinityPolicy
from agents.policies.infinity_blocks import place_angles, rotate
from agents.policies.lora import add_lora
from agents.policies.t5 import T5Features
from agents.testing import PolicyContract, TokenizerContract, cached_logits, random_grids
from var_env import ScaleSchedule, load_tokenizer
from var_env.tokenizers.infinity_vae import InfinityTokenizer, infinity_schedule

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (4, 4)], 16)
EVERY = range(3)
PROMPTS = (
    "a navy sign",
    "the pink wall",
    "one",
)  # the first two of equal length, see InfinityPolicy on the empty prompt


def save_t5(folder, width=128):
    """A text encoder as the public one is, whose words are whole ones and end with </s>."""
    words = ["<pad>", "</s>", "<unk>", *" ".join(PROMPTS).split()]
    text = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    text.pre_tokenizer = pre_tokenizers.Whitespace()
    text.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=text, **special).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 16, "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        T5EncoderModel(T5Config(**sizes)).save_pretrained(folder)
    return folder


@functools.cache
def text_encoder():
    return T5Features(save_t5(tempfile.mkdtemp()), 512)


def tiny_tokenizer(bits=6):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return InfinityTokenizer(SCHEDULE, bits, width=8).eval().requires_grad_(False)


def tiny_infinity(tokenizer=None, **options):
    """Random weights, larger than at birth, so that prompts and grids make a difference."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"depth": 2, "width": 32, "heads": 4, "places": 8, "precision": "fp32"} | options
        policy = InfinityPolicy(tokenizer or tiny_tokenizer(), text_encoder(), **settings)
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(torch.randn(weight.shape), alpha=0.2)
    return policy.eval()


class TestTokenizerContract(TokenizerContract):
    def make_tokenizer(self):
        return tiny_tokenizer()


class TestContract(PolicyContract):
    prompts = PROMPTS

    def make_policy(self):
        return tiny_infinity()


# The layout of the public files ---------------------------------------------------------------------------------------


def public_vae(tokenizer):
    """Weights as the public code saves them: convolutions and norms in wrappers, and the quantiser's mask."""
    wrappers = {torch.nn.Conv2d: "conv", torch.nn.GroupNorm: "norm"}
    named = [(name, module) for name, module in tokenizer.named_modules() if type(module) in wrappers]
    weights = {
        f"{name}.{wrappers[type(module)]}.{part}": weight
        for name, module in named
        for part, weight in module.state_dict().items()
    }
    return {"vae": weights | {"quantizer.lfq.mask": 2 ** torch.arange(tokenizer.depth - 1, -1, -1)}}


def public_model(policy, chunk=None):
    """Weights as the public code saves them, with the buffers that it adds; in chunks of so many blocks."""
    weights = dict(policy.state_dict())
    width = policy.config["width"]
    for i in range(policy.config["depth"]):
        weights |= {f"blocks.{i}.{part}.zero_k_bias": torch.zeros(width) for part in ("sa", "ca")}
    weights["text_proj_for_sos.ca.zero_k_bias"] = torch.zeros(width)
    if chunk is None:
        return weights
    moved = {}
    for name, weight in weights.items():
        head, _, rest = name.partition(".")
        if head == "blocks":
            number, _, rest = rest.partition(".")
            name = f"block_chunks.{int(number) // chunk}.module.{int(number) % chunk}.{rest}"
        moved[name] = weight
    return moved


def test_names_and_shapes_of_the_2b_model():
    with torch.device("meta"):
        tokenizer = InfinityTokenizer(infinity_schedule(1024))
        text = object.__new__(T5Features)
        text.name, text.width = "google/flan-t5-xl", 2048
        policy = InfinityPolicy(tokenizer, text)
    w = 2048

    def linear(name, leaving, entering):
        return {f"{name}.weight": (leaving, entering), f"{name}.bias": (leaving,)}

    def attention(name):
        return {f"{name}.v_bias": (w,)} | linear(f"{name}.proj", w, w)

    expected = {"cfg_uncond": (512, w), "text_norm.weight": (w,), "pos_start": (1, 1, w), "lvl_embed.weight": (15, w)}
    pool = "text_proj_for_sos.ca"
    expected |= attention(pool) | {f"{pool}.mat_q": (1, 16, 128), f"{pool}.mat_kv.weight": (2 * w, w)}
    for name in ("text_proj_for_ca.0", "text_proj_for_ca.2"):
        expected |= linear(name, w, w)
    expected |= linear("word_embed", w, 32) | linear("shared_ada_lin.1", 6 * w, w)
    expected |= linear("head_nm.ada_lin.1", 2 * w, w) | linear("head", 64, w)
    for i in range(32):
        block = f"blocks.{i}"
        expected |= attention(f"{block}.sa") | attention(f"{block}.ca") | {f"{block}.ada_gss": (1, 1, 6, w)}
        expected |= {f"{block}.sa.scale_mul_1H11": (1, 16, 1, 1), f"{block}.sa.q_bias": (w,)}
        expected |= {f"{block}.sa.mat_qkv.weight": (3 * w, w), f"{block}.ca.mat_kv.weight": (2 * w, w)}
        expected |= linear(f"{block}.ca.mat_q", w, w) | {f"{block}.ca_norm.{part}": (w,) for part in ("weight", "bias")}
        expected |= linear(f"{block}.ffn.fc1", 4 * w, w) | linear(f"{block}.ffn.fc2", w, 4 * w)
    assert {name: tuple(weight.shape) for name, weight in policy.state_dict().items()} == expected
    assert policy.schedule.grids[-1] == (64, 64) and tokenizer.image_size == 1024


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_public_files(tmp_path, chunk):
    tokenizer = InfinityTokenizer(infinity_schedule(256), 6, width=8).eval()
    torch.save(public_vae(tokenizer), tmp_path / "vae.pth")
    loaded = InfinityTokenizer.load_public(tmp_path / "vae.pth", 256)
    assert loaded.schedule.grids[-1] == (16, 16) and not loaded.training
    images = torch.randint(256, (1, 256, 256, 3), dtype=torch.uint8)
    assert all(torch.equal(a, b) for a, b in zip(loaded.encode(images), tokenizer.encode(images), strict=True))
    policy = tiny_infinity(tokenizer, depth=4)
    torch.save(public_model(policy, chunk), tmp_path / "model.pth")
    again = InfinityPolicy.load_public(tmp_path / "model.pth", loaded, text_encoder(), places=8, precision="fp32")
    grids, cond = random_grids(tokenizer, 2), policy.encode_prompts(PROMPTS[:2])
    assert torch.equal(again(cond, grids, range(7)), policy(cond, grids, range(7)))
    assert torch.equal(again.null_cond(cond).features, policy.null_cond(cond).features)


def test_other_files(tmp_path):
    tokenizer, policy = tiny_tokenizer(), tiny_infinity()
    with pytest.raises(FileNotFoundError, match=r"hf download FoundationVision/Infinity infinity_2b_reg\.pth"):
        InfinityPolicy.load_public(tmp_path / "infinity_2b_reg.pth", tokenizer, text_encoder())
    with pytest.raises(FileNotFoundError, match=r"FoundationVision/Infinity vae\.pth"):
        InfinityTokenizer.load_public(tmp_path / "vae.pth")
    torch.save(public_vae(tokenizer), tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"no Infinity transformer .* no text_norm\.weight\. It is infinity_2b"):
        InfinityPolicy.load_public(tmp_path / "vae.pth", tokenizer, text_encoder())
    torch.save(public_model(policy), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"no Infinity tokenizer .* no vae\. The tokenizer of the 2B"):
        InfinityTokenizer.load_public(tmp_path / "model.pth")
    torch.save({"vae": {"a": torch.zeros(1)}}, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"no encoder\.conv_in and decoder\.conv_in"):
        InfinityTokenizer.load_public(tmp_path / "vae.pth")
    with pytest.raises(ValueError, match="6 bits a token, the one given has 4"):
        InfinityPolicy.load_public(tmp_path / "model.pth", tiny_tokenizer(4), text_encoder())
    wide = T5Features(save_t5(tmp_path / "t5", 256), 512)
    with pytest.raises(ValueError, match="128 channels of the text encoder, the one given has 256"):
        InfinityPolicy.load_public(tmp_path / "model.pth", tokenizer, wide)
    weights = public_model(policy) | {"head.bias": torch.zeros(3)}
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"(?s)do not fit a InfinityPolicy.*head\.bias"):
        InfinityPolicy.load_public(tmp_path / "model.pth", tokenizer, text_encoder(), places=8)


def test_wrong_options(tmp_path):
    for options, message in (
        ({"width": 36}, "multiple of 4 . heads, got 36 and 4"),
        ({"precision": "fp16"}, "'fp16'"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_infinity(**options)
    with pytest.raises(ValueError, match="at most 15 grids have an embedding, the schedule has 16"):
        tiny_infinity(InfinityTokenizer(ScaleSchedule([(1, 1)] * 16, 16), 4, width=8))
    with pytest.raises(ValueError, match="patch=8"):
        InfinityTokenizer(ScaleSchedule([(1, 1)], 8))
    with pytest.raises(ValueError, match="no schedule for 300 pixels: choose one of 256, 512, 768, 1024"):
        infinity_schedule(300)
    with pytest.raises(FileNotFoundError, match="no T5 encoder at"):
        T5Features(tmp_path / "nothing", 512)


# What is its own ------------------------------------------------------------------------------------------------------


def test_places_turn_pairs_of_channels():
    """Against loops over tokens and pairs; a score of two tokens depends on how far apart they are."""
    places, channels = 8, 8
    angles = place_angles([(1, 1), (3, 2)], channels, places)
    assert angles.shape == (7, channels // 2) and not angles[0].any()
    x = torch.randn(1, 1, 7, channels, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, angles)
    row, column = 2, 1
    for i in range(channels // 2):
        y = round(row * places / 3) if i < channels // 4 else column * places / 2
        angle = torch.tensor(y / 10_000 ** (2 * (i % (channels // 4)) / (channels // 2)))
        plane = torch.view_as_complex(x[0, 0, 1 + row * 2 + column, 2 * i : 2 * i + 2].contiguous())
        expected = torch.view_as_real(plane * torch.polar(torch.ones(()), angle))
        torch.testing.assert_close(turned[0, 0, 1 + row * 2 + column, 2 * i : 2 * i + 2], expected)
    grid = rotate(x[:, :, :1].expand(-1, -1, 16, -1), place_angles([(4, 4)], channels, 4)).view(4, 4, channels)
    torch.testing.assert_close(grid[0, 0] @ grid[1, 2], grid[2, 1] @ grid[3, 3])


def test_a_policy_s_file_names_its_text_encoder(tmp_path):
    policy, tokenizer = tiny_infinity(), tiny_tokenizer()
    policy.save(tmp_path / "p.safetensors")
    tokenizer.save(tmp_path / "t.safetensors")
    loaded = load_policy(tmp_path / "p.safetensors", load_tokenizer(tmp_path / "t.safetensors"))
    assert type(loaded) is InfinityPolicy and type(loaded.tokenizer) is InfinityTokenizer
    grids = random_grids(tokenizer, 1)
    logits = [p(p.encode_prompts(PROMPTS[:1]), grids, EVERY) for p in (loaded.eval(), policy)]
    assert torch.equal(*logits)
    assert not any("shared.weight" in name for name in policy.state_dict()), "the text encoder has files of its own"


def test_copies_share_the_text_encoder():
    from agents.base import frozen_copy

    policy = tiny_infinity()
    assert frozen_copy(policy).text is policy.text
    assert not any(weight.requires_grad for weight in policy.text.model.parameters())


def test_the_empty_prompt_is_as_long_as_the_prompt():
    policy = tiny_infinity()
    cond = policy.encode_prompts([PROMPTS[0], PROMPTS[2]])  # 3 words and 1, each with </s>
    null = policy.null_cond(cond)
    assert cond.mask.sum(1).tolist() == [4, 2] and torch.equal(null.mask, cond.mask)
    assert torch.equal(null.features[0], policy.cfg_uncond[:4]) and not null.features[1, 2:].any()


def test_recomputed_blocks_have_the_same_gradients():
    gradients = []
    for gradient_checkpointing in (False, True):
        policy, grids = tiny_infinity(gradient_checkpointing=gradient_checkpointing), random_grids(tiny_tokenizer(), 2)
        policy(policy.encode_prompts(PROMPTS[:2]), grids, EVERY).square().sum().backward()
        gradients.append([weight.grad for weight in policy.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(*gradients, strict=True))


def test_bf16_stays_near_fp32_and_returns_fp32():
    grids = random_grids(tiny_tokenizer(), 3)
    full, half = tiny_infinity(), tiny_infinity(precision="bf16")
    stored = tiny_infinity(precision="bf16").to(torch.bfloat16)
    a, b, c = (p(p.encode_prompts(PROMPTS), grids, EVERY) for p in (full, half, stored))
    for other in (b, c):
        assert other.dtype == torch.float32 and 0 < (a - other).abs().max() < 0.1 * a.abs().max()
    cond = stored.encode_prompts(PROMPTS)
    cached = cached_logits(stored, stored.begin(cond), grids, EVERY)
    assert (cached - c).abs().max() < 0.1 * a.abs().max()


def test_adapters_alone_learn():
    policy = tiny_infinity()
    grids, cond = random_grids(policy.tokenizer, 1), policy.encode_prompts(PROMPTS[:1])
    before = policy(cond, grids, EVERY)
    add_lora(policy, r=2)
    torch.testing.assert_close(policy(cond, grids, EVERY), before)  # frozen weights may take other kernels
    policy(cond, grids, EVERY).square().sum().backward()
    moved = {name for name, weight in policy.named_parameters() if weight.grad is not None}
    assert moved and all("lora_" in name for name in moved)
    for layer in InfinityPolicy.lora_targets:
        assert any(f".{layer}.lora_" in name for name in moved)
