import pickle
import re
from fractions import Fraction

import pytest
import torch

from var_env import ScaleSchedule

SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
TABLE_6 = {64: 4, 128: 8, 256: 12, 512: 16, 1024: 18}  # resolution to the number of grids, "VAR RL Done Right"


def test_sizes_and_slices_lay_the_grids_end_to_end():
    schedule = ScaleSchedule([(1, 1), (2, 3), (4, 6)], patch=8)
    assert schedule.grids == ((1, 1), (2, 3), (4, 6))
    assert len(schedule) == 3
    assert schedule.sizes == (1, 6, 24)
    assert schedule.total_tokens == 31
    assert [list(range(31))[part] for part in schedule.slices] == [[0], list(range(1, 7)), list(range(7, 31))]


@pytest.mark.parametrize(("resolution", "m"), TABLE_6.items())
def test_split_is_table_6(resolution, m):
    assert ScaleSchedule([(side, side) for side in SIDES]).split(resolution=resolution) == m


def test_split_of_other_patches_and_shapes():
    assert ScaleSchedule([(1, 1), (2, 2), (4, 4), (8, 8)], patch=8).split(resolution=32) == 3
    assert ScaleSchedule([(1, 2), (2, 4), (4, 8)], patch=16).split(resolution=64) == 2  # the longer side
    assert ScaleSchedule([(1, 1)] * 5, patch=16).split(resolution=16) == 1  # the first that shows it


def test_split_names_the_available_resolutions():
    with pytest.raises(ValueError, match=r"100 pixels.*16, 32, 64"):
        ScaleSchedule([(1, 1), (2, 2), (4, 4)]).split(resolution=100)


ROWS = {  # Table 6, row by row as it is printed; each is said in full
    64: (1, 2, 3, 4),
    128: (1, 2, 3, 4, 5, 6, 7, 8),
    256: (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16),
    512: (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32),
    1024: (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64),
}
ASPECTS = [(1, 1), (3, 2), (2, 3), (9, 16), (16, 9), (1, 4), (1, 100)]


class TestNextFlow:
    @pytest.mark.parametrize(("resolution", "sides"), ROWS.items())
    def test_is_table_6(self, resolution, sides):
        schedule = ScaleSchedule.nextflow(resolution)
        assert schedule == ScaleSchedule([(side, side) for side in sides], patch=16)
        assert max(schedule.grids[-1]) * schedule.patch == resolution

    @pytest.mark.parametrize("aspect", ASPECTS)
    @pytest.mark.parametrize("resolution", ROWS)
    def test_every_resolution_by_name_at_every_aspect(self, resolution, aspect):
        schedule = ScaleSchedule.nextflow(resolution, aspect)
        for pixels, m in TABLE_6.items():
            if pixels <= resolution:
                assert schedule.middle_step(f"m_{pixels}") == schedule.split(resolution=pixels) == m
            else:
                with pytest.raises(ValueError, match=f"got 'm_{pixels}'"):
                    schedule.middle_step(f"m_{pixels}")

    @pytest.mark.parametrize("aspect", ASPECTS)
    def test_the_shorter_side_follows_the_ratio(self, aspect):
        schedule = ScaleSchedule.nextflow(1024, aspect)
        ratio = Fraction(min(aspect), max(aspect))
        for grid, side in zip(schedule.grids, ROWS[1024], strict=True):
            short, long = sorted(grid)
            assert long == side and (short == 1 or abs(short - side * ratio) <= Fraction(1, 2))
            assert grid == ((short, long) if aspect[0] < aspect[1] else (long, short))
        assert ScaleSchedule.nextflow(1024, aspect[::-1]).grids == tuple(grid[::-1] for grid in schedule.grids)

    def test_sixteen_to_nine_in_full(self):
        short = (1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9)
        assert ScaleSchedule.nextflow(256, (9, 16)).grids == tuple(zip(short, ROWS[256], strict=True))
        assert ScaleSchedule.nextflow(256, (720, 1280)) == ScaleSchedule.nextflow(256, (9, 16))

    @pytest.mark.parametrize("resolution", [0, 100, 2048, "m_128"])
    def test_other_resolutions(self, resolution):
        with pytest.raises(ValueError, match=f"for {resolution} pixels: choose one of 64, 128, 256, 512, 1024"):
            ScaleSchedule.nextflow(resolution)

    @pytest.mark.parametrize("aspect", [(0, 1), (1, -1), (1, 1, 1), (16,), (1.5, 1)])
    def test_other_aspects(self, aspect):
        with pytest.raises(ValueError, match=rf"aspect must be \(h, w\).*got {re.escape(str(aspect))}"):
            ScaleSchedule.nextflow(64, aspect)


class TestMiddleStep:
    @pytest.mark.parametrize("m", range(1, 19))
    def test_a_number_of_grids(self, m):
        assert ScaleSchedule.nextflow(1024).middle_step(m) == m

    @pytest.mark.parametrize(
        ("split", "m"),
        [(16, 16), ("m_16", 1), (32, 2), (64, 4), (128, 8), (256, 12), (512, 16), (768, 17), ("m_768", 17), (1024, 18)],
    )
    def test_a_resolution(self, split, m):
        assert ScaleSchedule.nextflow(1024).middle_step(split) == m

    def test_of_the_shipped_patch(self):
        schedule = ScaleSchedule([(side, side) for side in (1, 2, 3, 4, 6, 8)], patch=8)
        assert [schedule.middle_step(split) for split in (4, "m_32", 32, "m_8", 8, "m_64")] == [4, 4, 4, 1, 1, 6]

    def test_half_of_the_resolution(self):
        assert ScaleSchedule([(side, side) for side in (1, 2, 3, 4, 6, 8)], patch=8).middle_step("half") == 4
        assert ScaleSchedule.nextflow(1024).middle_step("half") == 16  # m_512
        assert ScaleSchedule([(1, 1), (3, 5)], patch=8).middle_step("half") == 2  # the first with at least half
        assert ScaleSchedule([(2, 2)], patch=8).middle_step("half") == 1

    def test_a_quarter_and_an_eighth(self):
        assert [ScaleSchedule.nextflow(1024).middle_step(share) for share in ("quarter", "eighth")] == [12, 8]
        room = ScaleSchedule([(side, side) for side in (1, 2, 3, 4, 6, 8, 12)], patch=8)
        assert [room.middle_step(share) for share in ("half", "quarter", "eighth")] == [5, 3, 2]
        raster = ScaleSchedule.raster((3, 3))
        assert [raster.middle_step(share) for share in ("half", "quarter", "eighth")] == [5, 3, 2]

    @pytest.mark.parametrize("split", [0, -1, 5, 100, "m_100", "m_", "m32", "4", "32", 2.0, 64.0, None])
    def test_anything_else(self, split):
        message = (
            f"number of prefix grids, 1 to 4, .*one of half, quarter, eighth, m_16, m_32, m_48, m_64; got {split!r}"
        )
        with pytest.raises(ValueError, match=message):
            ScaleSchedule.nextflow(64).middle_step(split)


def test_split_grids_and_join_are_inverse():
    schedule = ScaleSchedule([(1, 1), (2, 2), (3, 4)])
    flat = torch.arange(2 * 17 * 3).reshape(2, 17, 3)
    grids = schedule.split_grids(flat)
    assert [tuple(grid.shape) for grid in grids] == [(2, 1, 3), (2, 4, 3), (2, 12, 3)]
    assert all(torch.equal(grid, flat[:, part]) for grid, part in zip(grids, schedule.slices, strict=True))
    assert torch.equal(schedule.join(grids), flat)
    with pytest.raises(ValueError, match="17 tokens"):
        schedule.split_grids(flat[:, :16])


def test_a_schedule_is_a_value():
    schedule = ScaleSchedule([[1, 1], [2, 2]], patch=8)
    assert schedule == ScaleSchedule(((1, 1), (2, 2)), patch=8)
    assert schedule != ScaleSchedule([(1, 1), (2, 2)], patch=16)
    assert len({schedule, pickle.loads(pickle.dumps(schedule))}) == 1
    with pytest.raises(AttributeError):
        schedule.patch = 4


@pytest.mark.parametrize(
    ("grids", "patch", "message"),
    [
        ([], 16, "at least one grid"),
        ([(0, 1)], 16, "at least 1"),
        ([(1, 1, 1)], 16, r"\(h, w\)"),
        ([(3, 1), (2, 2)], 16, "larger than the last"),
        ([(1, 1)], 0, "patch"),
    ],
)
def test_bad_schedules(grids, patch, message):
    with pytest.raises(ValueError, match=message):
        ScaleSchedule(grids, patch)
