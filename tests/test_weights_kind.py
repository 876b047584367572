"""What a file of weights holds, and which tokenizer a policy belongs to."""

from importlib import resources

import pytest
from tiny import tiny_policy

from agents import GRPO
from agents.policies import SHIPPED as SHIPPED_POLICIES
from agents.policies import load_policy
from var_env import ScaleSchedule, Tokenizer
from var_env.tokenizers import load_tokenizer

SHIPPED = resources.files("agents.policies") / "assets"


def test_a_policy_and_a_tokenizer_mixed_up(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.safetensors")
    tiny_policy(tokenizer).save(tmp_path / "p.safetensors")
    for path in (tmp_path / "t.safetensors", resources.files("var_env") / "assets" / "tokenizer.safetensors"):
        with pytest.raises(ValueError, match="holds a tokenizer and no policy: give it as --tokenizer"):
            load_policy(path, tokenizer)
    for path in (tmp_path / "p.safetensors", SHIPPED / "base.safetensors"):
        with pytest.raises(ValueError, match="holds a policy and no tokenizer: give it as --policy"):
            load_tokenizer(path)
    for load in (load_policy, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"is a folder: give one .* it has p.safetensors, t.safetensors"):
            load(tmp_path)


def test_a_policy_says_which_tokenizer_it_belongs_to(tokenizer, tmp_path):
    tiny_policy(tokenizer).save(tmp_path / "p.safetensors")
    load_policy(tmp_path / "p.safetensors", tokenizer)
    other = Tokenizer(ScaleSchedule([(1, 1), (4, 4)], patch=16), vocab_size=32, channels=4, width=8, blocks=1)
    with pytest.raises(ValueError, match=r"belongs to a Tokenizer with grids \[\[1, 1\], \[2, 2\].*--tokenizer FILE"):
        load_policy(tmp_path / "p.safetensors", other)
    with pytest.raises(ValueError, match=r"vocab_size 32, and the one given .* 512|grids"):
        load_policy(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raster", "belongs to a RasterTokenizer"),
        ("raster_plain", "on this Tokenizer: give the tokenizer that they were"),
    ],
)
def test_raster_weights_without_their_tokenizer(name, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_policy(SHIPPED / f"{name}.safetensors")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (8, "lora must be a dict of options"),
        ("{r: 8}", "lora must be a dict of options"),
        ({"r": "x"}, "r must be a positive whole number, got 'x'"),
        ({"r": True}, "r must be a positive whole number"),
        ({"rank": 4}, "peft takes no adapters with lora=.*'rank'"),
        ({"lora_alpha": "q"}, "peft takes no adapters with lora="),
        ({"target_modules": "head"}, r"a list of names, such as \['head'\]"),
    ],
)
def test_malformed_lora(tokenizer, lora, message):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=message):
        GRPO(tiny_policy(tokenizer), None, lora=lora)


@pytest.mark.parametrize("name", list(SHIPPED_POLICIES))
def test_shipped_policies_load_by_name_and_bring_their_tokenizer(name):
    policy = load_policy(name)
    assert policy.schedule.is_raster == name.startswith("raster")
    assert policy.tokenizer.image_size == 64
