import numpy as np
import pytest
import torch

from var_env import World, mdp
from var_env.scenes import MAX_PROMPT_BYTES, scene_from_prompt


def scenes(count):
    rng = np.random.default_rng(0)
    return [World().sample(rng) for _ in range(count)]


def random_tokens(tokenizer, batch, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(tokenizer.vocab_size, size=(batch, n, 1)) for n in tokenizer.schedule.sizes]


def rollout(tokenizer, batch, steps, seed=0):
    states = [mdp.start(tokenizer, scenes(batch))]
    for tokens in random_tokens(tokenizer, batch, seed)[:steps]:
        states.append(mdp.append(tokenizer, states[-1], tokens))
    return states


def test_start_is_the_prompt_alone(tokenizer):
    state = mdp.start(tokenizer, scenes(2))
    assert state.t == 0 and state.grids == () and state.outcome is None
    assert (state.tokens == -1).all() and state.tokens.shape == (2, 21)
    assert bytes(state.prompts[1]).rstrip(b"\0").decode() == state.scenes[1].prompt
    assert not state.canvas.any()


def test_append_against_a_naive_sum_of_the_grids(tokenizer):
    state = rollout(tokenizer, 2, 3)[-1]
    canvas = torch.zeros_like(state.canvas)
    for t, tokens in enumerate(random_tokens(tokenizer, 2)):
        canvas = canvas + tokenizer.contribution(t, torch.from_numpy(tokens))
        assert np.array_equal(state.tokens[:, tokenizer.schedule.slices[t]], tokens[..., 0])
        assert np.array_equal(state.grids[t].numpy(), tokens)
    assert torch.equal(state.canvas, canvas)
    assert not state.canvas.requires_grad


def test_append_leaves_the_state_before_it_alone(tokenizer):
    states = rollout(tokenizer, 2, 3)
    again = rollout(tokenizer, 2, 3)
    for state, twin in zip(states, again, strict=True):
        assert np.array_equal(state.tokens, twin.tokens) and torch.equal(state.canvas, twin.canvas)
    assert [state.t for state in states] == [0, 1, 2, 3]


def test_finish_gives_one_entry_a_row(tokenizer, reward):
    state = mdp.finish(tokenizer, reward, rollout(tokenizer, 3, 3)[-1])
    end = state.outcome
    assert end["image"].shape == (3, 64, 64, 3) and end["image"].dtype == np.uint8
    assert np.allclose(end["score"], end["image"].mean((1, 2, 3)) / 255)
    for row, scene in enumerate(state.scenes):
        one = mdp.row_of(end, row)
        assert one["score"] == float(end["score"][row]) and one["parts"] == {"mean": one["score"]}
        assert one["words_read"] == ["SEEN"] and one["confidences"] == [0.5] and len(one["regions"]) == 1
        assert [part.indices for part in one["components"]] == [(0,), (1,)]
        assert sum(part.value for part in one["components"]) == pytest.approx(one["score"])
        assert [tuple(box) for box in one["boxes"]] == list(scene.boxes)
        assert end["boxes"][row].shape == (len(scene.words), 4)


@pytest.mark.parametrize("ended", [False, True])
def test_fork_repeats_rows_in_order(tokenizer, reward, ended):
    state = rollout(tokenizer, 2, 3)[-1]
    state = mdp.finish(tokenizer, reward, state) if ended else state
    forked = mdp.fork(state, 3)
    for row in range(6):
        source = row // 3
        assert forked.scenes[row] is state.scenes[source]
        assert np.array_equal(forked.prompts[row], state.prompts[source])
        assert np.array_equal(forked.tokens[row], state.tokens[source])
        assert torch.equal(forked.canvas[row], state.canvas[source])
        assert all(torch.equal(a[row], b[source]) for a, b in zip(forked.grids, state.grids, strict=True))
        if ended:
            assert mdp.row_of(forked.outcome, row)["score"] == mdp.row_of(state.outcome, source)["score"]
            assert np.array_equal(forked.outcome["image"][row], state.outcome["image"][source])


def test_observations_are_fresh_and_padded(tokenizer):
    state = rollout(tokenizer, 2, 2)[-1]
    first = mdp.observe(state)
    assert first["scale"].tolist() == [2, 2]
    assert (first["tokens"][:, :5] >= 0).all() and (first["tokens"][:, 5:] == -1).all()
    assert first["prompt"].shape == (2, MAX_PROMPT_BYTES)
    for value in first.values():
        value[:] = 0
    assert (mdp.observe(state)["tokens"][:, 5:] == -1).all() and (mdp.observe(state)["scale"] == 2).all()


def test_read_action_takes_every_documented_shape(tokenizer):
    rng = np.random.default_rng(0)
    canvas = rng.integers(32, size=(3, 4, 4))
    exact = canvas[:, :2, :2]
    expected = exact.reshape(3, 4, 1)
    for action in (canvas, exact, expected, expected[..., 0], torch.from_numpy(exact), exact.astype(np.uint8)):
        tokens = mdp.read_action(tokenizer, 1, 3, action, batched=True)
        assert tokens.dtype == np.int64 and np.array_equal(tokens, expected)
    for action in (canvas[0], exact[0], exact[0].tolist(), torch.from_numpy(canvas[0])):
        assert np.array_equal(mdp.read_action(tokenizer, 1, 1, action, batched=False), expected[:1])


def test_only_the_corner_of_the_canvas_counts(tokenizer):
    canvas = np.full((4, 4), -7)
    canvas[:2, :2] = 5
    assert mdp.read_action(tokenizer, 1, 1, canvas, batched=False).tolist() == [[[5]] * 4]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((3, 3), int), r"scale 1 .*\(4, 4\).*\(2, 2\).*got \(3, 3\)"),
        (np.zeros(4, int), r"got \(4,\)"),  # flat grids are for batches
        (np.zeros((1, 2, 2), int), r"got \(1, 2, 2\)"),
        (np.zeros((2, 2)), "integers, got dtype float64"),
        (np.zeros((2, 2), bool), "integers, got dtype bool"),
        ([[1, 2], [3]], "no array of integers"),
        (None, "integers, got dtype object"),
        (torch.zeros(2, 2, dtype=torch.bfloat16), "no array of integers"),
        (np.full((2, 2), 32), "token 32: use 0 to 31"),
        (np.array([[0, 0], [0, -1]]), "token -1: use 0 to 31"),
        (np.full((2, 2), 2**63, np.uint64), f"token {2**63}"),
    ],
)
def test_bad_actions(tokenizer, action, message):
    with pytest.raises(ValueError, match=message):
        mdp.read_action(tokenizer, 1, 1, action, batched=False)


@pytest.mark.parametrize(
    ("options", "batch", "message"),
    [
        ({"promt": "x"}, None, "unknown reset option 'promt': choose 'prompt' or 'scene'"),
        ({"prompts": ["x"]}, None, "unknown reset option 'prompts'"),
        ({"prompt": "x"}, 2, "unknown reset option 'prompt': choose 'prompts' or 'scenes'"),
        ({"prompt": 'A "B"', "scene": scene_from_prompt('A "B"')}, None, "not both"),
        ({"prompt": 3}, None, "takes str, got 3"),
        ({"scene": 'A "B"'}, None, "takes Scene"),
        ({"prompts": ['A "B"']}, 2, "one entry a row, 2; got 1"),
        ({"prompt": "no quotes"}, None, "no quotes"),
        ({"prompt": '"A" ' * 100}, None, f"{MAX_PROMPT_BYTES}"),
    ],
)
def test_bad_options(options, batch, message):
    with pytest.raises(ValueError, match=message):
        mdp.requested_scenes(options, batch, 64)


def components(**changed):
    arguments = {"split": "train", "regions": None, "size": 64, "reward_kwargs": None, "world": None}
    return mdp.components(**{**arguments, **changed})


def test_components_take_names_and_objects(tokenizer, reward, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.safetensors")
    world, loaded, made = components(
        split="val", regions={"1": 0.25, 2: 0.75}, reward="ocr", tokenizer=tmp_path / "tokenizer.safetensors"
    )
    assert (world.split, world.regions, made.name) == ("val", {1: 0.25, 2: 0.75}, "ocr")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tokenizer.parameters(), strict=True))
    assert components(reward=reward, tokenizer=tokenizer, world=world) == (world, tokenizer, reward)


def test_bad_components(tokenizer, reward, tmp_path):
    with pytest.raises(ValueError, match=r"64 px .* 128 px: set size=64"):
        components(size=128, tokenizer=tokenizer, reward=reward)
    with pytest.raises(ValueError, match="unknown reward 'orc'"):
        components(tokenizer=tokenizer, reward="orc")
    with pytest.raises(ValueError, match="penalty"):
        components(tokenizer=tokenizer, reward="ocr", reward_kwargs={"penalti": 1})
    with pytest.raises(ValueError, match="reward must be a name"):
        components(tokenizer=tokenizer, reward=reward, reward_kwargs={"a": 1})
    with pytest.raises(ValueError, match="reward must be a name"):
        components(tokenizer=tokenizer, reward=3)
    with pytest.raises(ValueError, match="split 'tarin'"):
        components(split="tarin", tokenizer=tokenizer, reward=reward)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        components(tokenizer=str(tmp_path / "nowhere.safetensors"), reward=reward)
