"""The playground without the web: images that grow, go back, take a grid by hand and are finished several times."""

import numpy as np
import pytest
import torch
from conftest import Brightness
from tiny import tiny_policy

from agents import Decoding
from agents.experiments.playground import Drawing, Limits, Player, Players, Sessions, caches_of
from agents.rollout import Caches, unroll
from agents.vmr import middle_return

PROMPT = 'A navy sign that says "KITE" in yellow letters'


@pytest.fixture
def player(tokenizer, reward):
    return Player(tiny_policy(tokenizer), reward)


def finished(player, seed=1, decoding=None):
    drawing = Drawing(player, PROMPT, decoding or Decoding(), seed)
    while not drawing.finished:
        drawing.sample()
    return drawing


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(temperature=0.7, top_k=5, guidance=1.5)])
def test_the_image_of_a_seed_is_that_of_unroll(player, decoding):
    drawing, envs = finished(player, 5, decoding), player.start(PROMPT, 512)
    caches = Caches(player.policy, player.policy.encode_prompts([PROMPT]), decoding.guided)
    unroll(player.policy, envs, caches, range(3), decoding, torch.Generator().manual_seed(5))
    assert [frame.name for frame in drawing.frames] == ["1x1", "2x2", "4x4"]
    assert [frame.tokens for frame in drawing.frames] == [grid.flatten().tolist() for grid in envs.grids]
    assert np.array_equal(drawing.frames[-1].image, envs.outcome["image"][0])


def test_every_frame_is_read(player):
    for frame in finished(player).frames:
        assert frame.words == ["SEEN"] and frame.boxes.tolist() == [[0, 0, 8, 8]]
        mean = frame.image.mean() / 255
        assert frame.score == pytest.approx(mean) and frame.parts["mean"] == pytest.approx(mean)  # fp32 and fp64
        assert [name for name, _, _ in frame.asked] == ["half 1", "half 2"]


def test_going_back_keeps_what_is_before(player):
    drawing = finished(player)
    kept, old = drawing.frames[:2], drawing.frames[2].tokens
    drawing.back_to(2)
    drawing.decode_with(Decoding(), 7)
    drawing.sample()
    assert drawing.frames[:2] == kept and drawing.finished and drawing.frames[2].tokens != old


def test_a_grid_by_hand(player):
    drawing = finished(player)
    first, tokens = drawing.frames[0], [3, 1, 4, 1]
    assert drawing.write(1, tokens).tokens == tokens
    assert drawing.frames[0] is first and len(drawing.frames) == 2
    drawing.sample()
    assert drawing.envs.grids[1].flatten().tolist() == tokens and drawing.finished


def test_the_last_grid_by_hand_ends_the_image(player):
    drawing = finished(player)
    assert drawing.write(2, [0] * 16).score == pytest.approx(drawing.envs.outcome["score"][0])


def test_caches_of_grids_that_were_not_drawn_give_the_same_logits(player):
    drawing = finished(player)
    drawing.back_to(2)
    policy, envs, grids = player.policy, drawing.envs, drawing.envs.grids
    logits, null = caches_of(policy, envs, True).step(2, envs.tokenizer.read(2, envs.canvas), grids[-1])
    with torch.no_grad():
        cond = policy.encode_prompts([PROMPT])
        for found, given in ((logits, cond), (null, policy.null_cond(cond))):
            expected = policy(given, grids, range(2, 3))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # cached against teacher-forced, fp32


def test_endings_share_their_prefix_and_leave_the_image_alone(player):
    drawing = finished(player)
    before = [frame.tokens for frame in drawing.frames]
    endings, value = drawing.suffixes(1, 4, Decoding(), 9)
    assert len({tuple(frame.tokens) for frame in endings}) == 4
    scores = torch.tensor([frame.score for frame in endings]).double()
    assert value == pytest.approx(middle_return(scores, 1.0).item())
    assert [frame.tokens for frame in drawing.frames] == before and drawing.finished


def test_a_code_looks_like_a_grid_of_it(player, tokenizer):
    drawing = finished(player)
    sheet, columns, tile = drawing.codes(0)
    assert sheet.shape == (tile, 32 * tile, 3) and columns == 32
    drawing.write(0, [5])
    shown = drawing.frames[0].image.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(sheet[:, 5 * tile : 6 * tile] - shown).max() <= 1  # rounded


class TestRefused:
    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("", "the prompt is empty"),
            (" \n", "the prompt is empty"),
            ("A sign", "names no word in double quotes"),
            ('A 12" sign that says "RUN"', "opens no quotation"),
            ('A sign that says "RUN', "no partner"),
            ('A sign that says "' + "A" * 200 + '"', "at most 192 fit"),
            ('A sign that says "\ud800"', "surrogate"),
        ],
    )
    def test_a_prompt_that_cannot_be_read(self, player, prompt, message):
        with pytest.raises(ValueError, match=message):
            Drawing(player, prompt, Decoding(), 0)

    def test_what_the_policy_alone_cannot_read(self, tokenizer, reward):
        player = Player(tiny_policy(tokenizer, prompt_bytes=20), reward)
        with pytest.raises(ValueError, match="at most 20 fit"):
            Drawing(player, PROMPT, Decoding(), 0)

    def test_a_limit_below_the_policys(self, player):
        with pytest.raises(ValueError, match="at most 10 fit"):
            Drawing(player, PROMPT, Decoding(), 0, Limits(prompt_bytes=10))

    @pytest.mark.parametrize("seed", [-1, 2**64, 1.5, None])
    def test_seeds(self, player, seed):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            Drawing(player, PROMPT, Decoding(), seed)

    def test_beyond_the_end_and_before_it_is_there(self, player):
        drawing = finished(player)
        with pytest.raises(ValueError, match="the image is finished"):
            drawing.sample()
        drawing = Drawing(player, PROMPT, Decoding(), 0)
        for band in (-1, 1, 3):
            with pytest.raises(ValueError, match=f"grid {band + 1} cannot be drawn yet: 0 of them"):
                drawing.back_to(band)

    @pytest.mark.parametrize(
        ("tokens", "message"), [([1, 2, 3], "4 tokens, got 3"), ([0, 0, 0, 32], "no token 32"), ([-1] * 4, "-1")]
    )
    def test_grids_by_hand(self, player, tokens, message):
        drawing = finished(player)
        with pytest.raises(ValueError, match=message):
            drawing.write(1, tokens)
        assert drawing.finished, "nothing is forgotten for a grid that is refused"

    @pytest.mark.parametrize("count", [0, 9])
    def test_too_many_images(self, player, count):
        with pytest.raises(ValueError, match=f"1 to 8 images can be drawn at a time, got {count}"):
            finished(player).suffixes(1, count, Decoding(), 0)

    def test_policies_that_were_not_given(self, player):
        players = Players({"mine": player}, Brightness())
        assert players.names == ["mine", "base", "plain", "raster", "raster_plain"] and players.get("mine") is player
        with pytest.raises(ValueError, match=r"no policy '/etc/agent.zip' here: choose of mine, base"):
            players.get("/etc/agent.zip")


def test_notes_of_a_prompt_unlike_the_worlds(player):
    assert player.notes(PROMPT) == []
    assert "write KITE" in player.notes('A sign that says "kite"')[0]


def test_sessions_are_apart_and_the_oldest_goes():
    sessions = Sessions(2)
    first, second = sessions.open(), sessions.open()
    assert sessions.get(first) is not sessions.get(second)
    sessions.get(first)  # used since
    sessions.open()
    assert sessions.get(first)
    with pytest.raises(KeyError, match="reload the page"):
        sessions.get(second)
