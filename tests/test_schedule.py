import pickle

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
