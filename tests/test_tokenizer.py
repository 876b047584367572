import numpy as np
import pytest
import torch
import torch.nn.functional as F

from var_env.scenes import World, render
from var_env.schedule import ScaleSchedule
from var_env.tokenizers import Tokenizer


def rendered(count, placement="even", seed=0):
    world, rng = World(split="test", placement=placement), np.random.default_rng(seed)
    return torch.from_numpy(np.stack([render(world.sample(rng)) for _ in range(count)]))


def canvas_of(tokenizer, grids):
    canvas = tokenizer.blank(len(grids[0]))
    for t, grid in enumerate(grids):
        canvas = tokenizer.write(t, canvas, grid)
    return canvas


def test_shapes(tokenizer, schedule):
    grids = tokenizer.encode(rendered(2))
    assert [grid.shape for grid in grids] == [(2, n, 1) for n in schedule.sizes]
    assert all(grid.dtype == torch.int64 and grid.min() >= 0 and grid.max() < 32 for grid in grids)
    canvas = canvas_of(tokenizer, grids)
    assert canvas.shape == (2, 4, 4, 4)
    for t, n in enumerate(schedule.sizes):
        assert tokenizer.read(t, canvas).shape == tokenizer.embed(t, grids[t]).shape == (2, n, 4)
    image = tokenizer.decode(canvas)
    assert image.shape == (2, 64, 64, 3) and image.dtype == torch.uint8


def test_encode_is_the_greedy_residual_quantiser(tokenizer, schedule):
    """Against a loop over images, scales and places, with distances written out."""
    images = rendered(2)
    grids = tokenizer.encode(images)
    features = tokenizer.features(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    for b in range(2):
        residual = features[b : b + 1]
        for t, (h, w) in enumerate(schedule.grids):
            small = F.interpolate(residual, size=(h, w), mode="area")[0]
            codes = []
            for i in range(h):
                for j in range(w):
                    codes.append(min(range(32), key=lambda k: (small[:, i, j] - tokenizer.codebook[k]).norm().item()))
            assert grids[t][b, :, 0].tolist() == codes
            residual = residual - tokenizer.contribution(t, torch.tensor(codes).view(1, -1, 1))


def test_write_leaves_the_canvas_alone(tokenizer):
    canvas = tokenizer.blank(1)
    written = tokenizer.write(2, canvas, torch.zeros(1, 16, 1, dtype=torch.int64))
    assert not canvas.any() and written.any()


def test_read_of_the_blank_canvas_is_zero_and_of_the_last_grid_the_canvas(tokenizer):
    assert not tokenizer.read(0, tokenizer.blank(3)).any()
    canvas = torch.randn(1, 4, 4, 4)
    assert torch.equal(tokenizer.read(2, canvas), canvas.flatten(2).transpose(1, 2))


def test_grids_need_not_be_square_or_nested():
    tokenizer = Tokenizer(ScaleSchedule([(1, 1), (2, 3), (6, 6)], patch=8), vocab_size=8, channels=4, width=8, blocks=1)
    grids = tokenizer.encode(torch.zeros(1, 48, 48, 3, dtype=torch.uint8))
    assert [grid.shape[1] for grid in grids] == [1, 6, 36]


class TestSwaps:
    def test_none_without_swap(self, tokenizer):
        features = torch.randn(2, 4, 4, 4)
        written, labels = tokenizer.quantise(features)
        assert all(torch.equal(a, b) for a, b in zip(written, labels, strict=True))

    def test_swapped_codes_are_near_the_label_and_later_labels_correct_them(self, tokenizer):
        features = torch.randn(64, 4, 4, 4)
        written, labels = tokenizer.quantise(features, swap=0.5, generator=torch.Generator().manual_seed(0))
        swapped = torch.cat([w != y for w, y in zip(written, labels, strict=True)], 1)
        assert 0.45 < swapped.float().mean() < 0.55
        order = torch.cdist(tokenizer.codebook, tokenizer.codebook).argsort(-1)
        for w, y in zip(written, labels, strict=True):
            rank = (order[y.flatten()] == w.view(-1, 1)).int().argmax(-1)
            assert rank.max() <= 16
        residual = features - canvas_of(tokenizer, written[:2])
        assert torch.equal(labels[2], tokenizer.nearest(tokenizer.read(2, residual)))


class TestFiles:
    @pytest.mark.parametrize("half", [False, True])
    def test_round_trip(self, tokenizer, tmp_path, half):
        tokenizer.save(tmp_path / "t.safetensors", half=half)
        loaded = Tokenizer.load(tmp_path / "t.safetensors")
        assert loaded.schedule == tokenizer.schedule and not loaded.training
        for name, weight in tokenizer.state_dict().items():
            expected = weight.bfloat16().float() if half else weight
            assert torch.equal(loaded.state_dict()[name], expected)
        assert not any(p.requires_grad for p in loaded.parameters())

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere.*vartext pretrain tokenizer"):
            Tokenizer.load(tmp_path / "nowhere.safetensors")

    def test_cut_short(self, tokenizer, tmp_path):
        path = tmp_path / "t.safetensors"
        tokenizer.save(path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"cannot read weights from .*t\.safetensors, corrupt"):
            Tokenizer.load(path)

    def test_of_another_kind(self, tmp_path):
        path = tmp_path / "t.safetensors"
        path.write_text("not weights")
        with pytest.raises(ValueError, match="corrupt or not made by"):
            Tokenizer.load(path)


def test_the_shipped_tokenizer_draws_what_it_encodes():
    tokenizer = Tokenizer.load()
    images = rendered(16, placement="free")
    restored = tokenizer.decode(canvas_of(tokenizer, tokenizer.encode(images)))
    assert (restored.float() - images.float()).abs().mean() < 8  # of 255
