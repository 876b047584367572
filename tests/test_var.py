"""FoundationVision's VAR: the contract on tiny models, the layout of the public files, and what is its own.

That logits, samples and images are those of the public code was checked against it, on random weights.
"""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import Logger

from agents import make
from agents.policies import load_policy
from agents.policies.class_names import ClassNames
from agents.policies.lora import add_lora, merge_lora
from agents.policies.var import VARPolicy
from agents.rollout import Caches, unroll
from agents.sampling import Decoding
from agents.testing import (
    FixedPrompts,
    PolicyContract,
    TokenizerContract,
    TopHalf,
    cached_logits,
    random_grids,
)
from var_env import ScaleSchedule, VARTextEnv, VARTextVectorEnv, load_tokenizer
from var_env.scenes import Scene
from var_env.tokenizers.base import to_unit
from var_env.tokenizers.var_vqvae import VAR_256, VAR_512, VARTokenizer, phi_index

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3)], 16)
EVERY = range(3)
PROMPTS = ("7", "207", "13")


def tiny_tokenizer(schedule=SCHEDULE):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = VARTokenizer(schedule, vocab_size=32, channels=8, width=8)
    return tokenizer.eval().requires_grad_(False)


def tiny_var(tokenizer=None, **options):
    """Random weights, larger than at birth, so that classes and grids make a difference."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"depth": 2, "width": 32, "heads": 4, "classes": 1000, "precision": "fp32"} | options
        policy = VARPolicy(tokenizer or tiny_tokenizer(), **settings)
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(torch.randn(weight.shape), alpha=0.2)
    return policy.eval()


def public_weights(module):
    """A module's weights as the public code would save them, with the buffers that it adds."""
    weights = dict(module.state_dict())
    if isinstance(module, VARTokenizer):
        return weights | {"quantize.ema_vocab_hit_SV": torch.zeros(len(module.schedule), module.vocab_size)}
    tokens, width = module.schedule.total_tokens, module.config["width"]
    scales = module._scales()
    zeros = {f"blocks.{i}.attn.zero_k_bias": torch.zeros(width) for i in range(len(module.blocks))}
    mask = torch.zeros(1, 1, tokens, tokens).masked_fill(scales[:, None] < scales, -torch.inf)
    return weights | zeros | {"lvl_1L": scales[None], "attn_bias_for_masking": mask}


class TestTokenizerContract(TokenizerContract):
    def make_tokenizer(self):
        return tiny_tokenizer()


class TestContract(PolicyContract):
    prompts = PROMPTS

    def make_policy(self):
        return tiny_var()


class TestSharedAdaLNContract(PolicyContract):
    """As the model of depth 36; with names, and blocks that are computed twice."""

    prompts = ("class 7", "class 207", "class 13")

    def make_policy(self):
        labels = [f"class {number}" for number in range(300)]
        return tiny_var(depth=1, shared_adaln=True, classes=300, labels=labels, gradient_checkpointing=True)


# The layout of the public files. A line holds a kind of layer, its shape and its names, with choices in braces.

VQVAE_LAYOUT = """
conv 160 3 3      encoder.conv_in
norm 160          encoder.down.{0,1}.block.{0,1}.{norm1,norm2} encoder.down.2.block.0.norm1
conv 160 160 3    encoder.down.{0,1}.block.{0,1}.{conv1,conv2} encoder.down.{0,1}.downsample.conv
conv 320 160 3    encoder.down.2.block.0.conv1
conv 320 160 1    encoder.down.2.block.0.nin_shortcut
norm 320          encoder.down.{2,3}.block.{0,1}.norm2 encoder.down.{2,3}.block.1.norm1
norm 320          encoder.down.{3,4}.block.0.norm1
conv 320 320 3    encoder.down.{2,3}.block.{0,1}.conv2 encoder.down.{2,3}.block.1.conv1 encoder.down.3.block.0.conv1
conv 320 320 3    encoder.down.{2,3}.downsample.conv
conv 640 320 3    encoder.down.4.block.0.conv1
conv 640 320 1    encoder.down.4.block.0.nin_shortcut
norm 640          encoder.down.4.block.{0,1}.norm2 encoder.down.4.block.1.norm1 encoder.down.4.attn.{0,1}.norm
conv 640 640 3    encoder.down.4.block.{0,1}.conv2 encoder.down.4.block.1.conv1
norm 640          {encoder,decoder}.mid.{block_1,block_2}.{norm1,norm2} {encoder,decoder}.mid.attn_1.norm
conv 640 640 3    {encoder,decoder}.mid.{block_1,block_2}.{conv1,conv2}
conv 1920 640 1   encoder.down.4.attn.{0,1}.qkv decoder.up.4.attn.{0,1,2}.qkv {encoder,decoder}.mid.attn_1.qkv
conv 640 640 1    encoder.down.4.attn.{0,1}.proj_out decoder.up.4.attn.{0,1,2}.proj_out
conv 640 640 1    {encoder,decoder}.mid.attn_1.proj_out
norm 640          encoder.norm_out
conv 32 640 3     encoder.conv_out
conv 640 32 3     decoder.conv_in
norm 640          decoder.up.4.block.{0,1,2}.{norm1,norm2} decoder.up.4.attn.{0,1,2}.norm decoder.up.3.block.0.norm1
conv 640 640 3    decoder.up.4.block.{0,1,2}.{conv1,conv2} decoder.up.4.upsample.conv
conv 320 640 3    decoder.up.3.block.0.conv1
conv 320 640 1    decoder.up.3.block.0.nin_shortcut
norm 320          decoder.up.{2,3}.block.{0,1,2}.norm2 decoder.up.{2,3}.block.{1,2}.norm1 decoder.up.{1,2}.block.0.norm1
conv 320 320 3    decoder.up.{2,3}.block.{0,1,2}.conv2 decoder.up.{2,3}.block.{1,2}.conv1 decoder.up.2.block.0.conv1
conv 320 320 3    decoder.up.{2,3}.upsample.conv
conv 160 320 3    decoder.up.1.block.0.conv1
conv 160 320 1    decoder.up.1.block.0.nin_shortcut
norm 160          decoder.up.{0,1}.block.{0,1,2}.norm2 decoder.up.{0,1}.block.{1,2}.norm1 decoder.up.0.block.0.norm1
conv 160 160 3    decoder.up.{0,1}.block.{0,1,2}.conv2 decoder.up.{0,1}.block.{1,2}.conv1 decoder.up.0.block.0.conv1
conv 160 160 3    decoder.up.1.upsample.conv
norm 160          decoder.norm_out
conv 3 160 3      decoder.conv_out
conv 32 32 3      quant_conv post_quant_conv quantize.quant_resi.qresi_ls.{0,1,2,3}
table 4096 32     quantize.embedding
"""

VAR_D16_LAYOUT = """
linear 1024 32    word_embed
table 1001 1024   class_emb
table 10 1024     lvl_embed
free 1 1 1024     pos_start
free 1 680 1024   pos_1LC
free 1 16 1 1     blocks.*.attn.scale_mul_1H11
free 1024         blocks.*.attn.{q_bias,v_bias}
table 3072 1024   blocks.*.attn.mat_qkv
linear 1024 1024  blocks.*.attn.proj
linear 4096 1024  blocks.*.ffn.fc1
linear 1024 4096  blocks.*.ffn.fc2
linear 6144 1024  blocks.*.ada_lin.1
linear 2048 1024  head_nm.ada_lin.1
linear 4096 1024  head
"""


def layout(text, blocks=0):
    """Names of tensors and their shapes. A conv has its kernel's side last, and a "free" tensor no layer."""
    shapes = {}
    for line in text.replace("*", "{" + ",".join(map(str, range(blocks))) + "}").strip().splitlines():
        kind, *rest = line.split()
        sizes = list(map(int, itertools.takewhile(str.isdecimal, rest)))
        for name in itertools.chain.from_iterable(map(choices, rest[len(sizes) :])):
            assert not {name, f"{name}.weight"} & set(shapes), f"{name} is there twice"
            weight = (*sizes, sizes[-1]) if kind == "conv" else tuple(sizes)
            shapes[name if kind == "free" else f"{name}.weight"] = weight
            if kind in ("conv", "norm", "linear"):
                shapes[f"{name}.bias"] = (sizes[0],)
    return shapes


def choices(name):
    """``a.{0,1}`` to ``a.0`` and ``a.1``."""
    parts = [part.split(",") if i % 2 else [part] for i, part in enumerate(re.split("{(.*?)}", name))]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def shapes_of(module):
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


class TestPublicLayout:
    def test_names_and_shapes(self):
        with torch.device("meta"):
            tokenizer = VARTokenizer()
            policy = VARPolicy(tokenizer)
        assert shapes_of(tokenizer) == layout(VQVAE_LAYOUT)
        assert shapes_of(policy) == layout(VAR_D16_LAYOUT, 16)

    def test_the_512_model(self):
        """One AdaLN for all blocks, an offset in each, and other grids."""
        with torch.device("meta"):
            tokenizer = VARTokenizer(VAR_512)
            policy = VARPolicy(tokenizer, depth=36, shared_adaln=True)
        shapes = shapes_of(policy)
        assert tokenizer.image_size == 512 and shapes_of(tokenizer) == layout(VQVAE_LAYOUT)
        assert shapes["pos_1LC"] == (1, 2240, 2304) and shapes["shared_ada_lin.1.weight"] == (6 * 2304, 2304)
        assert shapes["blocks.35.ada_gss"] == (1, 1, 6, 2304) and "blocks.35.ada_lin.1.weight" not in shapes

    def test_sizes_follow_from_the_files(self, tmp_path):
        tokenizer, policy = tiny_tokenizer(), tiny_var(shared_adaln=True)
        torch.save(public_weights(tokenizer), tmp_path / "vae.pth")
        torch.save(public_weights(policy), tmp_path / "var.pth")
        mine = VARTokenizer.load_public(tmp_path / "vae.pth", SCHEDULE)
        assert mine.config == tokenizer.config and not any(weight.requires_grad for weight in mine.parameters())
        loaded = VARPolicy.load_public(tmp_path / "var.pth", mine, precision="fp32")
        assert loaded.config == policy.config and not loaded.training
        assert all(weight.requires_grad for weight in loaded.parameters())
        grids, cond = random_grids(tokenizer, 3), policy.encode_prompts(PROMPTS)
        assert torch.equal(loaded(cond, grids, EVERY), policy(cond, grids, EVERY))
        canvas = tokenizer.write(1, tokenizer.blank(3), grids[1])
        assert torch.equal(mine.decode(mine.write(1, mine.blank(3), grids[1])), tokenizer.decode(canvas))

    def test_half_precision_weights_and_adapters(self, tmp_path):
        policy = tiny_var()
        torch.save(public_weights(policy), tmp_path / "var.pth")
        options = {"dtype": torch.bfloat16, "precision": "fp32", "lora": {"r": 2}, "gradient_checkpointing": True}
        half = VARPolicy.load_public(tmp_path / "var.pth", policy.tokenizer, **options)
        grids, cond = random_grids(policy.tokenizer, 3), policy.encode_prompts(PROMPTS)
        logits, exact = half(cond, grids, EVERY), policy(cond, grids, EVERY)
        assert half.head.weight.dtype == torch.bfloat16 and logits.dtype == torch.float32
        assert 0 < (logits - exact).abs().max() < 0.05 * exact.abs().max()
        assert {name for name, weight in half.named_parameters() if weight.requires_grad}

    def test_missing_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"hf download FoundationVision/var vae_ch160v4096z32\.pth"):
            VARTokenizer.load_public(tmp_path / "vae_ch160v4096z32.pth")
        with pytest.raises(FileNotFoundError, match=r"hf download FoundationVision/var var_d16\.pth"):
            VARPolicy.load_public(tmp_path / "var_d16.pth", tiny_tokenizer())
        with pytest.raises(FileNotFoundError, match="load_public"):
            VARPolicy.load(tmp_path / "none", tiny_tokenizer())

    def test_other_files(self, tmp_path):
        (tmp_path / "text.pth").write_bytes(b"<html>not found</html>")
        with pytest.raises(ValueError, match=r"cannot read weights from .*text\.pth"):
            VARTokenizer.load_public(tmp_path / "text.pth")
        torch.save(public_weights(tiny_tokenizer()), tmp_path / "vae.pth")
        with pytest.raises(ValueError, match=r"holds no VAR transformer .*class_emb.*var_d16\.pth"):
            VARPolicy.load_public(tmp_path / "vae.pth", tiny_tokenizer())
        torch.save([1], tmp_path / "list.pth")
        with pytest.raises(ValueError, match="holds no VAR tokenizer"):
            VARTokenizer.load_public(tmp_path / "list.pth")

    @pytest.mark.parametrize("name", ["blocks.1.attn.q_bias", "head_nm.ada_lin.1.weight"])
    def test_a_name_or_a_shape_that_does_not_fit(self, name, tmp_path):
        policy = tiny_var()
        weights = public_weights(policy)
        torch.save({**weights, name: weights[name][:1]}, tmp_path / "shape.pth")
        torch.save({key: weight for key, weight in weights.items() if key != name}, tmp_path / "name.pth")
        torch.save({**weights, name + "_2": weights[name]}, tmp_path / "more.pth")
        for file in ("shape", "name", "more"):
            with pytest.raises(ValueError, match=rf"(?s){file}\.pth do not fit a VARPolicy: .*{re.escape(name)}"):
                VARPolicy.load_public(tmp_path / f"{file}.pth", policy.tokenizer)

    def test_another_schedule(self, tmp_path):
        torch.save(public_weights(tiny_var()), tmp_path / "var.pth")
        with pytest.raises(
            ValueError, match=r"grids with \(1, 4, 9\) tokens, the tokenizer's have \(1, 4\): .*VAR_512"
        ):
            VARPolicy.load_public(tmp_path / "var.pth", tiny_tokenizer(ScaleSchedule([(1, 1), (2, 2)], 16)))
        with pytest.raises(ValueError, match="16 pixels a token, the schedule has patch=8"):
            VARTokenizer(ScaleSchedule([(1, 1), (2, 2)], 8))


class TestTokenizer:
    def test_schedules(self):
        assert [VAR_256.total_tokens, VAR_512.total_tokens] == [680, 2240]
        assert [VAR_256.canvas[0] * VAR_256.patch, VAR_512.canvas[0] * VAR_512.patch] == [256, 512]

    def test_the_phi_of_each_scale(self):
        assert [phi_index(t, 10) for t in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
        assert [phi_index(t, 4) for t in range(4)] == [0, 1, 2, 3]
        assert phi_index(0, 1) == 0

    def test_the_canvas_is_what_encoding_took_away(self):
        """Features are the canvas plus what no grid could hold, which each grid's codes are nearest to."""
        tokenizer = tiny_tokenizer()
        images = torch.randint(256, (2, 48, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        residual = tokenizer.features(to_unit(images))
        for t, grid in enumerate(tokenizer.encode(images)):
            wanted = tokenizer.read(t, residual)  # (B, n_t, C)
            distances = (wanted.unsqueeze(2) - tokenizer.codebook).square().sum(-1)  # (B, n_t, V)
            assert torch.equal(distances.argmin(-1, keepdim=True), grid)
            residual = residual - tokenizer.write(t, tokenizer.blank(2), grid)

    def test_a_file_knows_its_class(self, tmp_path):
        tokenizer = tiny_tokenizer()
        tokenizer.save(tmp_path / "t.safetensors", half=True)
        loaded = load_tokenizer(tmp_path / "t.safetensors")
        assert type(loaded) is VARTokenizer and loaded.schedule == SCHEDULE
        tiny_var().save(tmp_path / "p.safetensors")
        assert type(load_policy(tmp_path / "p.safetensors", tokenizer)) is VARPolicy


class TestClasses:
    def test_numbers(self):
        policy = tiny_var()
        cond = policy.encode_prompts([" 7", "999", "0", ""])
        assert cond.label.tolist() == [7, 999, 0, 1000] and policy.null_cond(cond).label.tolist() == [1000] * 4
        for wrong in ("1000", "-1", "golden retriever", "7.0"):
            with pytest.raises(ValueError, match=r"is no class: use a number, 0 to 999, or give labels="):
                policy.encode_prompts([wrong])

    def test_names(self, tmp_path):
        labels = ["tench, Tinca tinca", "golden retriever", "crane, bird", "crane", "crane, lifter"]
        lists = [labels, tmp_path / "list.json", tmp_path / "mapping.json"]
        lists[1].write_text(json.dumps(labels))
        lists[2].write_text(json.dumps(dict(enumerate(labels))))
        for given in lists:
            policy = tiny_var(classes=5, labels=given)
            assert policy.config["labels"] == labels
            found = policy.encode_prompts(
                ["Golden Retriever", "tinca tinca", "tench, tinca tinca", "3", "crane", "bird"]
            )
            assert found.label.tolist() == [1, 0, 0, 3, 3, 2]
        with pytest.raises(ValueError, match="'poodle' is no class: use a number, 0 to 4, or one of the labels"):
            policy.encode_prompts(["poodle"])
        with pytest.raises(ValueError, match="labels must be 4 names, one a class, got 5"):
            tiny_var(classes=4, labels=labels)
        (tmp_path / "gap.json").write_text('{"0": "tench", "2": "crane"}')
        with pytest.raises(ValueError, match=r"labels must be 2 names, one a class, got 2: \['tench', None\]"):
            tiny_var(classes=2, labels=tmp_path / "gap.json")

    def test_a_name_of_several_classes(self):
        names = ClassNames(2, ["crane, bird", "crane, lifter"])
        assert names.number("crane, lifter") == names.number("lifter") == 1
        with pytest.raises(ValueError, match=r"'crane' names the classes \[0, 1\]: give one of these numbers"):
            names.number("crane")


class TestPolicy:
    def test_hidden_states_make_the_logits(self):
        policy = tiny_var()
        cond, grids = policy.encode_prompts(PROMPTS), random_grids(policy.tokenizer, 3)
        hidden = policy.hidden(cond, grids, range(1, 3))
        assert hidden.shape == (3, 13, 32)
        assert torch.equal(policy.logits(hidden, range(1, 3)), policy(cond, grids, range(1, 3)))

    @pytest.mark.parametrize("shared_adaln", [False, True])
    def test_recomputed_blocks_have_the_same_gradients(self, shared_adaln):
        gradients = []
        for gradient_checkpointing in (False, True):
            policy = tiny_var(gradient_checkpointing=gradient_checkpointing, shared_adaln=shared_adaln)
            logp, _ = policy.evaluate(policy.encode_prompts(PROMPTS), random_grids(policy.tokenizer, 3), EVERY)
            logp.sum().backward()
            gradients.append([weight.grad for weight in policy.parameters()])
        for plain, recomputed in zip(*gradients, strict=True):
            torch.testing.assert_close(plain, recomputed)

    def test_inverse_temperatures_end_at_100(self):
        policy = tiny_var()
        cond, grids = policy.encode_prompts(PROMPTS), random_grids(policy.tokenizer, 3)
        logits = []
        for value in (1.0, np.log(100), 9.0):
            with torch.no_grad():
                for block in policy.blocks:
                    block.attn.scale_mul_1H11.fill_(value)
            logits.append(policy(cond, grids, EVERY))
        assert torch.equal(logits[1], logits[2]) and not torch.allclose(logits[0], logits[1])

    def test_bf16_stays_near_fp32(self):
        full, half = tiny_var(), tiny_var(precision="bf16")
        cond, grids = full.encode_prompts(PROMPTS), random_grids(full.tokenizer, 3)
        a, b = full(cond, grids, EVERY), half(cond, grids, EVERY)
        assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.05 * a.abs().max()
        cached = cached_logits(half, half.begin(cond), grids, EVERY)
        assert (cached - b).abs().max() < 0.05 * a.abs().max()

    def test_adapters_merge(self):
        policy = tiny_var(depth=1)
        cond, grids = policy.encode_prompts(PROMPTS), random_grids(policy.tokenizer, 3)
        before = policy(cond, grids, EVERY)
        add_lora(policy, r=2)
        torch.testing.assert_close(policy(cond, grids, EVERY), before)  # frozen weights may take other kernels
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                weight.add_(0.1 if "lora_B" in name else 0.0)
        changed = policy(cond, grids, EVERY)
        assert not torch.allclose(changed, before)
        torch.testing.assert_close(merge_lora(policy)(cond, grids, EVERY), changed, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"precision": "fp16"}, "'fp16'"),
            ({"width": 30}, "width must be a multiple of heads, got 30 and 4"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            tiny_var(**options)


# The environment, without words in its prompts -----------------------------------------------------------------------


class Brightness(TopHalf):
    """A reward that does not read and asks for no words."""

    def check_scenes(self, scenes, count):
        assert len(scenes) == count


class Classes(FixedPrompts):
    """Classes to draw, which name no words."""

    def sample(self, rng):
        return Scene(str(rng.choice(self.prompts)), (), size=self.size)


def parts(tokenizer):
    return {"world": Classes(PROMPTS, tokenizer.image_size), "tokenizer": tokenizer, "reward": Brightness()}


def test_the_environment_draws_classes():
    policy = tiny_var()
    env = VARTextEnv(**parts(policy.tokenizer))
    observation, info = env.reset(seed=0)
    assert info["prompt"] in PROMPTS and info["words"] == []
    for _ in EVERY:
        observation, reward, over, _, info = env.step(np.zeros(env.action_space.shape, np.int64))
    assert over and info["image"].shape == (48, 48, 3) and 0 <= reward <= 1
    assert observation["prompt"].tobytes().rstrip(b"\0").decode() in PROMPTS


def test_guidance_that_grows_with_the_scale():
    """The public sampler's, as `VARPolicy` says to make it: no guidance at the first scale, ``1 + cfg`` at the last."""
    policy = tiny_var()
    cond = policy.encode_prompts(PROMPTS)
    envs = VARTextVectorEnv(3, **parts(policy.tokenizer))
    envs.reset(seed=0, options={"scenes": [Scene(prompt, (), size=48) for prompt in PROMPTS]})
    with torch.no_grad():
        caches, grids = Caches(policy, cond, guided=True), []
        for k in EVERY:
            decoding = Decoding(guidance=1 + 4.0 * k / 2, temperature=0)
            grids += unroll(policy, envs, caches, range(k, k + 1), decoding).grids
        conditional, null = (policy(c, grids, EVERY) for c in (cond, policy.null_cond(cond)))
    for k, part in enumerate(policy.schedule.slices):
        t = 4.0 * k / 2
        expected = ((1 + t) * conditional[:, part] - t * null[:, part]).argmax(-1)
        assert torch.equal(grids[k], expected)


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_agents_learn_without_words(recipe):
    policy = tiny_var()
    agent = make(
        recipe,
        VARTextVectorEnv(2, **parts(policy.tokenizer)),
        policy,
        group_size=2,
        prompts_per_update=2,
        seed=0,
        device="cpu",
    )
    agent.set_logger(logger := Logger(None, []))
    before = policy.head.weight.detach().clone()
    agent.learn(1, log_interval=100)
    assert not torch.equal(policy.head.weight, before)
    assert all(np.isfinite(value) for value in logger.name_to_value.values())
    observation, _ = VARTextEnv(**parts(policy.tokenizer)).reset(seed=1)
    assert agent.predict(observation)[0].shape == (3, 3)
