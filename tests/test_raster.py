"""Raster schedules and their tokenizer."""

import numpy as np
import pytest
import torch
from conftest import Brightness
from stable_baselines3.common.logger import Logger
from test_policies import small_tokenizer
from tiny import tiny_policy

from agents import make
from agents.mask_propagation import boxes_to_mask, propagate_mask
from agents.testing import TokenizerContract, random_grids
from var_env import ScaleSchedule, VARTextEnv, load_tokenizer
from var_env.tokenizers import Tokenizer
from var_env.tokenizers.raster import RasterTokenizer


def raster_tokenizer():
    return RasterTokenizer(small_tokenizer(((4, 4),))).eval().requires_grad_(False)


class TestContract(TokenizerContract):
    def make_tokenizer(self):
        return raster_tokenizer()


def test_an_image_is_that_of_the_tokenizer_inside():
    tokenizer = raster_tokenizer()
    images = torch.randint(256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (whole,) = tokenizer.grid.encode(images)
    assert torch.equal(torch.cat(tokenizer.encode(images), 1), whole)
    canvas = tokenizer.blank(2)
    for t, token in enumerate(tokenizer.encode(images)):
        canvas = tokenizer.write(t, canvas, token)
    expected = tokenizer.grid.decode(tokenizer.grid.contribution(0, whole))
    assert (tokenizer.decode(canvas).int() - expected.int()).abs().max() <= 1  # grey levels, from rounding


def test_a_token_changes_its_own_cell_of_the_canvas():
    tokenizer = raster_tokenizer()
    canvas, grids = tokenizer.blank(1), random_grids(tokenizer, 1)
    for t, token in enumerate(grids):
        after = tokenizer.write(t, canvas, token)
        changed = (after != canvas).any(1).squeeze(0).nonzero().tolist()
        assert changed == [list(divmod(t, 4))]
        assert torch.equal(tokenizer.read(t + 1, after), tokenizer.codebook[token.flatten()][None]) or t == 15
        canvas = after


def test_a_swapped_token_stays_in_the_vocabulary_and_labels_are_the_codes():
    tokenizer = raster_tokenizer()
    features = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    written, labels = tokenizer.quantise(features, 0.5, torch.Generator().manual_seed(1))
    assert len(written) == len(labels) == 16
    assert torch.equal(torch.cat(labels, 1), tokenizer.grid.quantise(features)[1][0])
    share = (torch.cat(written, 1) != torch.cat(labels, 1)).float().mean()
    assert 0.2 < share < 0.8


def test_a_file_knows_its_class(tmp_path):
    raster_tokenizer().save(tmp_path / "t.safetensors", half=True)
    assert type(load_tokenizer(tmp_path / "t.safetensors")) is RasterTokenizer
    small_tokenizer().save(tmp_path / "s.safetensors")
    assert type(load_tokenizer(tmp_path / "s.safetensors")) is Tokenizer
    env = VARTextEnv(tokenizer=tmp_path / "t.safetensors", reward=Brightness())
    assert env.schedule == ScaleSchedule.raster((4, 4), patch=16)


def test_more_than_one_scale():
    with pytest.raises(ValueError, match="a raster has one scale, the tokenizer has 3"):
        RasterTokenizer(small_tokenizer())


def test_the_environment_takes_a_token_a_step():
    env = VARTextEnv(tokenizer=raster_tokenizer(), reward=Brightness(), render_mode="ansi")
    assert env.action_space.shape == (1, 1)
    observation, _ = env.reset(seed=0)
    for t in range(16):
        assert observation["scale"] == t
        observation, reward, over, _, info = env.step(np.array([[t]]))
    assert over and reward == info["score"] and observation["tokens"].tolist() == list(range(16))
    assert "  row_2  4 5 6 7" in env.render()


def test_a_mask_is_that_of_the_token_s_own_cell():
    schedule = ScaleSchedule.raster((4, 4), patch=16)
    finest = boxes_to_mask([[17, 0, 32, 15]], schedule)
    assert finest.nonzero().tolist() == [[0, 1]]
    masks = propagate_mask(finest[None], schedule)
    assert [mask.shape for mask in masks] == [(1, 1, 1)] * 16
    assert [bool(mask) for mask in masks] == [t == 1 for t in range(16)]


@pytest.mark.parametrize("recipe", ["ppo", "stage", "vmr+panw+mp"])
def test_curves_are_of_rows(recipe, tmp_path):
    tokenizer = raster_tokenizer()
    agent = make(
        recipe,
        VARTextEnv(tokenizer=tokenizer, reward=Brightness()),
        tiny_policy(tokenizer),
        group_size=4,
        prompts_per_update=2,
        seed=0,
        device="cpu",
    )
    agent.set_logger(Logger(None, []))
    agent.learn(1, log_interval=100)
    names = {name for name in agent.logger.name_to_value if name.startswith(("scale/", "mask/", "values/", "stage/"))}
    assert "scale/entropy_row_1" in names
    assert not any("1x1" in name for name in names), names
    assert {name.rpartition("row_")[2] for name in names if "row_" in name} <= {"1", "2", "3", "4"}


def test_a_raster_has_one_temperature():
    policy = tiny_policy(raster_tokenizer())
    assert policy.sharpness.shape == (1,) and policy.diagnostics() == {"temperature": 1.0}
