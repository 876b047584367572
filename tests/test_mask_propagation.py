import csv
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny import STEPS_A_ROLLOUT, csv_logger, nudge, tiny_agent

from agents import GRPO, PANW, VMR, MaskPropagation
from agents.losses import group_advantages
from agents.mask_propagation import boxes_to_mask, overlap, propagate_mask
from var_env import ScaleSchedule

EVERYTHING = range(3)
SQUARE = ScaleSchedule([(s, s) for s in (1, 2, 3, 4, 6, 8)], patch=8)
THREE_TO_FOUR = ScaleSchedule([(3, 3), (4, 4)], patch=4)
OBLONG = ScaleSchedule([(1, 1), (1, 3), (3, 2), (2, 5), (5, 7)], patch=3)  # not square, and a side may shrink
SCHEDULES = pytest.mark.parametrize("schedule", [SQUARE, THREE_TO_FOUR, OBLONG], ids=["square", "3-4", "oblong"])


def random_boxes(schedule, count, seed):
    """Corners in any order and partly outside, as floats: some boxes are degenerate."""
    h, w = schedule.grids[-1]
    low, high = -3, (np.array([w, h, w, h]) * schedule.patch) + 3
    return np.random.default_rng(seed).uniform(low, high, (count, 4)).astype(np.float32)


def overlaps(box, x0, y0, x1, y1):
    left, top, right, bottom = box
    return right > left and bottom > top and min(right, x1) > max(left, x0) and min(bottom, y1) > max(top, y0)


def naive_mask(boxes, schedule, soft=False, dilation=0):
    (h, w), p = schedule.grids[-1], schedule.patch
    boxes = [(x0 - dilation, y0 - dilation, x1 + dilation, y1 + dilation) for x0, y0, x1, y1 in boxes.tolist()]
    mask = torch.zeros(h, w)
    for i in range(h):
        for j in range(w):
            if soft:
                pixels = [(x, y) for x in range(j * p, j * p + p) for y in range(i * p, i * p + p)]
                mask[i, j] = sum(any(overlaps(b, x, y, x + 1, y + 1) for b in boxes) for x, y in pixels) / p**2
            else:
                mask[i, j] = any(overlaps(b, j * p, i * p, j * p + p, i * p + p) for b in boxes)
    mask = mask if mask.any() else torch.ones(h, w)
    return mask if soft else mask.bool()


def common(i, h, j, k):
    """The length that cell i of h and cell j of k share on a side of length one."""
    return max(Fraction(0), min(Fraction(i + 1, h), Fraction(j + 1, k)) - max(Fraction(i, h), Fraction(j, k)))


def naive_propagation(finest, schedule):
    masks = [finest]
    for h, w in schedule.grids[-2::-1]:
        finer = masks[0]
        coarser = torch.zeros(len(finer), h, w, dtype=finest.dtype)
        for b in range(len(finer)):
            for i in range(h):
                for j in range(w):
                    for k in range(finer.shape[1]):
                        for m in range(finer.shape[2]):
                            area = common(i, h, k, finer.shape[1]) * common(j, w, m, finer.shape[2])
                            if finest.dtype == torch.bool:
                                coarser[b, i, j] |= bool(area > 0 and finer[b, k, m])
                            else:
                                coarser[b, i, j] += float(area * h * w) * finer[b, k, m]
        masks.insert(0, coarser)
    return masks


def image(mask):
    return ["".join(".#"[int(cell)] for cell in row) for row in mask]


class TestBoxesToMask:
    @SCHEDULES
    @pytest.mark.parametrize("options", [{}, {"soft": True}, {"dilation": 2}, {"soft": True, "dilation": 1}], ids=str)
    def test_matches_a_naive_loop(self, schedule, options):
        for seed in range(6):
            boxes = random_boxes(schedule, seed % 4, seed)
            mask = boxes_to_mask(boxes, schedule, **options)
            assert mask.dtype == (torch.float32 if "soft" in options else torch.bool)
            torch.testing.assert_close(mask, naive_mask(boxes, schedule, **options))

    def test_a_box_on_cell_borders_covers_these_cells_alone(self):
        assert image(boxes_to_mask([(4, 8, 12, 12)], THREE_TO_FOUR)) == ["....", "....", ".##.", "...."]
        assert image(boxes_to_mask([(3.9, 8, 12.1, 12)], THREE_TO_FOUR)) == ["....", "....", "####", "...."]

    def test_a_box_on_the_images_border_and_one_sticking_out(self):
        expected = ["...#", "....", "....", "#..."]
        assert image(boxes_to_mask([(12, 0, 16, 4), (0, 12, 4, 16)], THREE_TO_FOUR)) == expected
        assert image(boxes_to_mask([(13, -9, 99, 1), (-5, 14, 0.5, 16.5)], THREE_TO_FOUR)) == expected

    @pytest.mark.parametrize("soft", [False, True])
    @pytest.mark.parametrize(
        "boxes",
        [
            np.zeros((0, 4), np.float32),
            [],
            [(3, 3, 3, 9)],
            [(9, 9, 3, 3)],
            [(-5, 0, 0, 8), (0, 16, 8, 20), (30, 30, 40, 40)],
            [(np.nan, 0, 8, 8)],
        ],
        ids=["none", "empty tuple", "no width", "inside out", "all outside", "nan"],
    )
    def test_where_nothing_is_covered_all_is_on(self, boxes, soft):
        mask = boxes_to_mask(boxes, THREE_TO_FOUR, soft)
        assert mask.shape == (4, 4) and (mask == 1).all()

    def test_one_box_in_the_image_is_enough(self):
        boxes = [(0, 0, 1, 1), (3, 3, 3, 9), (30, 30, 40, 40)]
        assert image(boxes_to_mask(boxes, THREE_TO_FOUR)) == ["#...", "....", "....", "...."]

    def test_soft_is_the_covered_share_and_counts_a_pixel_once(self):
        boxes = [(0, 0, 2, 4), (1, 0, 3, 4), (4, 4, 8, 8)]
        mask = boxes_to_mask(boxes, THREE_TO_FOUR, soft=True)
        assert mask[0, 0] == 0.75 and mask[1, 1] == 1 and mask.sum() == 1.75

    @SCHEDULES
    def test_soft_is_above_zero_where_hard_is_on(self, schedule):
        for seed in range(5):
            boxes = random_boxes(schedule, 2, seed)
            assert torch.equal(boxes_to_mask(boxes, schedule, soft=True) > 0, boxes_to_mask(boxes, schedule))

    def test_dilation_grows_on_every_side(self):
        box = (5, 5, 7, 7)
        assert image(boxes_to_mask([box], THREE_TO_FOUR, dilation=1)) == ["....", ".#..", "....", "...."]
        assert image(boxes_to_mask([box], THREE_TO_FOUR, dilation=2)) == ["###.", "###.", "###.", "...."]
        assert boxes_to_mask([box], THREE_TO_FOUR, soft=True, dilation=1)[1, 1] == 1


class TestPropagateMask:
    @SCHEDULES
    @pytest.mark.parametrize("share", [0.02, 0.3])
    def test_matches_a_naive_loop(self, schedule, share):
        noise = torch.rand(2, *schedule.grids[-1], generator=torch.Generator().manual_seed(0))
        for finest in (noise < share, noise):
            masks = propagate_mask(finest, schedule)
            assert [mask.shape[1:] for mask in masks] == list(schedule.grids)
            for mask, expected in zip(masks, naive_propagation(finest, schedule), strict=True):
                torch.testing.assert_close(mask, expected)

    def test_three_to_four(self):
        finest = torch.zeros(3, 4, 4, dtype=torch.bool)
        finest[0, 0, 0] = finest[1, 1, 2] = finest[2, 3, 1] = True
        masks = [image(mask) for mask in propagate_mask(finest, THREE_TO_FOUR)[0]]
        # A corner cell lies in one coarser cell; an inner one, such as 1/4 to 2/4, in 0 to 1/3 and in 1/3 to 2/3.
        assert masks == [["#..", "...", "..."], [".##", ".##", "..."], ["...", "...", "##."]]

    def test_goes_step_by_step(self):
        # 0 to 1/6 of the height misses the second third; but by way of the 4x4 grid, 1/6 to 2/6 reaches it.
        schedule = ScaleSchedule([(3, 1), (4, 1), (6, 1)])
        finest = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]], dtype=torch.bool).unsqueeze(2)
        coarsest = propagate_mask(finest, schedule)[0].squeeze(2)
        assert coarsest.tolist() == [[True, False, False], [True, True, False]]

    def test_overlaps_are_whole_numbers_and_share_out_every_cell(self):
        for coarse in range(1, 9):
            for fine in range(1, 9):
                found = overlap(coarse, fine)
                assert found.tolist() == [
                    [common(i, coarse, j, fine) * coarse * fine for j in range(fine)] for i in range(coarse)
                ]
                assert (found.sum(1) == fine).all() and (found.sum(0) == coarse).all()

    def test_soft_masks_keep_their_mean(self):
        finest = boxes_to_mask([(3, 5, 40, 29)], SQUARE, soft=True)[None]
        for mask in propagate_mask(finest, SQUARE):
            torch.testing.assert_close(mask.mean(), finest.mean())

    @pytest.mark.parametrize("finest", [torch.ones(1, 3, 3), torch.ones(4, 4), torch.ones(1, 4, 4, dtype=torch.int64)])
    def test_another_shape_or_type(self, finest):
        with pytest.raises(ValueError, match=r"bool or float \(B, 4, 4\), got torch"):
            propagate_mask(finest, THREE_TO_FOUR)


def boxed(rollout, seed=0):
    """The rollout with other regions: some images show text at a random place, and in every fifth nothing is read."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 48, (len(rollout.images), 2)).astype(np.float32)
    rollout.regions = [np.zeros((0, 4)) if i % 5 == 3 else np.array([[*c, *(c + 9)]]) for i, c in enumerate(corners)]
    return rollout


class TestWeights:
    @pytest.mark.parametrize("options", [{}, {"soft": True}, {"dilation": 3}], ids=str)
    @pytest.mark.parametrize("steps", [EVERYTHING, range(2), range(1, 3)], ids=str)
    def test_policy_term_is_gated_and_kl_is_not(self, parts, steps, options):
        agent = MaskPropagation(tiny_agent(parts), **options)
        rollout = boxed(agent.sample())
        before, after = agent.unwrapped.token_weights(rollout, steps), agent.token_weights(rollout, steps)
        assert torch.equal(after.kl, before.kl)
        schedule = agent.policy.schedule
        for row in range(8):
            finest = naive_mask(rollout.regions[row], schedule, options.get("soft", False), options.get("dilation", 0))
            masks = naive_propagation(finest[None], schedule)
            expected = torch.cat([masks[t].flatten() for t in steps])
            torch.testing.assert_close(after.policy[row], before.policy[row] * expected)
        assert (after.policy[3] == before.policy[3]).all()  # nothing was read
        assert after.policy.sum() < before.policy.sum()

    def test_union_over_the_images_of_a_row(self, parts):
        agent = MaskPropagation(tiny_agent(parts, VMR, split=2, suffix_samples=3))
        rollout = boxed(agent.sample())
        assert rollout.suffixes == 3 and len(rollout.scenes) == 8 and len(rollout.grids) == 2
        masks, schedule = agent.masks(rollout), agent.policy.schedule
        finest = torch.stack([naive_mask(boxes, schedule) for boxes in rollout.regions])
        union = torch.stack([finest[3 * b] | finest[3 * b + 1] | finest[3 * b + 2] for b in range(8)])
        for mask, expected in zip(masks, naive_propagation(union, schedule), strict=True):
            assert torch.equal(mask, expected)
        unread = torch.tensor([any(len(rollout.regions[3 * b + k]) == 0 for k in range(3)) for b in range(8)])
        assert torch.equal(masks[-1].flatten(1).all(1), unread) and 0 < unread.sum() < 8
        weights = agent.token_weights(rollout, range(2))
        assert torch.equal(weights.policy, agent.unwrapped.token_weights(rollout, range(2)).policy * flat(masks[:2]))

    @pytest.mark.parametrize("soft", [False, True])
    @pytest.mark.parametrize("combine", ["intersection", "mean"])
    def test_other_combinations_of_the_images_of_a_row(self, parts, combine, soft):
        agent = MaskPropagation(tiny_agent(parts, VMR, split=2, suffix_samples=3), suffix_masks=combine, soft=soft)
        rollout, schedule = boxed(agent.sample()), agent.policy.schedule
        finest = torch.stack([naive_mask(boxes, schedule, soft) for boxes in rollout.regions])
        masks = agent.masks(rollout)
        for mask, own in zip(masks, naive_propagation(finest, schedule), strict=True):
            for row in range(8):
                of_row = own[3 * row : 3 * row + 3].float()
                expected = of_row.mean(0) if combine == "mean" else of_row.min(0).values
                torch.testing.assert_close(mask[row].float(), expected)
        weights, bare = (each.token_weights(rollout, range(2)) for each in (agent, agent.unwrapped))
        torch.testing.assert_close(weights.policy, bare.policy * flat(masks[:2]))
        assert torch.equal(weights.kl, bare.kl)

    def test_combinations_are_in_order_and_agree_for_one_image(self, parts):
        names, found = ("intersection", "mean", "union"), {}
        for k in (1, 3):
            for name in names:
                agent = MaskPropagation(tiny_agent(parts, VMR, split=2, suffix_samples=k), suffix_masks=name)
                found[k, name] = flat(agent.masks(boxed(agent.sample()))).float()
        assert all(torch.equal(found[1, name], found[1, "union"]) for name in names)
        least, mean, most = (found[3, name] for name in names)
        assert (least <= mean).all() and (mean <= most).all() and least.sum() < mean.sum() < most.sum()
        assert torch.equal(mean == 1, least == 1) and torch.equal(mean > 0, most == 1)

    def test_a_raster_token_has_the_mask_of_its_own_cell(self):
        schedule = ScaleSchedule.raster((4, 3), patch=8)
        finest = boxes_to_mask([(9, 8, 24, 17)], schedule)
        assert image(finest) == ["...", ".##", ".##", "..."]
        masks = propagate_mask(finest[None], schedule)
        assert [tuple(mask.shape) for mask in masks] == [(1, 1, 1)] * 12
        assert torch.equal(flat(masks)[0], finest.flatten())

    def test_layout_takes_the_scenes_boxes(self, parts):
        agent = MaskPropagation(tiny_agent(parts, VMR, split=2, suffix_samples=2), boxes="layout")
        rollout = boxed(agent.sample())
        rows = range(len(rollout.scenes))
        layouts = [np.array([[4 * b, 20, 4 * b + 24, 44]]) for b in rows]
        rollout.scenes = [replace(rollout.scenes[b], boxes=tuple(map(tuple, layouts[b].tolist()))) for b in rows]
        rollout.scenes[5] = replace(rollout.scenes[5], boxes=())  # as if made from its prompt alone
        finest = agent.masks(rollout)[-1]
        for b in rows:
            expected = naive_mask(layouts[b], agent.policy.schedule) if b != 5 else torch.ones(4, 4, dtype=torch.bool)
            assert torch.equal(finest[b], expected)

    @pytest.mark.parametrize("steps", [EVERYTHING, range(2)], ids=str)
    @pytest.mark.parametrize("soft", [False, True])
    def test_commutes_with_panw(self, parts, steps, soft):
        inside = MaskPropagation(PANW(tiny_agent(parts), alpha=0.6), soft=soft)
        outside = PANW(MaskPropagation(tiny_agent(parts), soft=soft), alpha=0.6)
        rollout = boxed(inside.sample())
        left, right = inside.token_weights(rollout, steps), outside.token_weights(rollout, steps)
        exact = {"atol": 0, "rtol": 0}
        torch.testing.assert_close(left.policy, right.policy, **({"atol": 0, "rtol": 1e-6} if soft else exact))
        torch.testing.assert_close(left.kl, right.kl, **exact)
        assert (left.policy < left.kl).any()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"boxes": "drawn"}, "boxes 'drawn'.*read, layout"),
            ({"dilation": -1}, "dilation .*at least 0, got -1"),
            ({"suffix_masks": "own"}, "suffix_masks 'own'.*union, intersection, mean"),
        ],
    )
    def test_bad_options(self, parts, options, message):
        agent = tiny_agent(parts)
        with pytest.raises(ValueError, match=message):
            MaskPropagation(agent, **options)
        assert agent.outermost is agent


def flat(masks):
    return torch.cat([mask.flatten(1) for mask in masks], 1)


class TestGradient:
    @pytest.fixture
    def case(self, parts):
        """An agent off its reference, its rollout, and the gradient of its loss at each token's logits."""
        agent = MaskPropagation(tiny_agent(parts, kl_coef=0.5))
        rollout = boxed(agent.sample())
        nudge(agent.unwrapped)
        advantages = group_advantages(rollout.scores).flatten()
        forward = agent.policy.forward

        def gradient(weights):
            seen = []

            def spy(*args):
                seen.append(forward(*args))
                seen[-1].retain_grad()
                return seen[-1]

            agent.policy.forward = spy
            shares = agent.aggregate(weights, EVERYTHING)
            loss, _ = agent.loss(rollout, torch.arange(8), advantages, shares, None, EVERYTHING)
            loss.backward()
            return seen[0].grad[:, :, 0]  # (B, L, V)

        return agent, rollout, gradient

    def test_masked_tokens_get_none_from_the_policy_term(self, case):
        agent, rollout, gradient = case
        weights, mask = agent.token_weights(rollout, EVERYTHING), flat(agent.masks(rollout))
        assert 0 < mask.sum() < mask.numel()
        from_policy = gradient(weights._replace(kl=torch.zeros_like(weights.kl)))
        assert (from_policy[~mask] == 0).all()
        assert (from_policy[mask].abs().amax(-1) > 0).all()

    def test_masked_tokens_are_held_by_the_kl_and_kept_ones_feel_both(self, case):
        agent, rollout, gradient = case
        weights, mask = agent.token_weights(rollout, EVERYTHING), flat(agent.masks(rollout))
        both = gradient(weights)
        from_kl = gradient(weights._replace(policy=torch.zeros_like(weights.policy)))
        unmasked = gradient(agent.unwrapped.token_weights(rollout, EVERYTHING))
        assert (from_kl.abs().amax(-1) > 0).all()  # of every token
        assert torch.equal(both[~mask], from_kl[~mask])
        assert torch.equal(both[mask], unmasked[mask])
        assert not torch.equal(both, unmasked)


def mask_columns(folder):
    """``mask/`` in the one row that was logged."""
    with open(folder / "progress.csv") as file:
        (row,) = csv.DictReader(file)
    return {name: float(value) for name, value in row.items() if name.startswith("mask/")}


class TestLogs:
    def test_how_much_is_kept_at_every_scale(self, parts, tmp_path):
        agent = MaskPropagation(tiny_agent(parts))
        agent.set_logger(csv_logger(tmp_path))
        agent.learn(STEPS_A_ROLLOUT)
        assert mask_columns(tmp_path) == {
            "mask/kept_1_1x1": 1,
            "mask/kept_2_2x2": 1 / 4,
            "mask/kept_3_4x4": 1 / 16,
        }  # the toy reward's box

    def test_only_of_the_scales_that_learn(self, parts, tmp_path):
        agent = MaskPropagation(tiny_agent(parts, VMR, split=2))
        agent.set_logger(csv_logger(tmp_path))
        agent.learn(1)
        assert sorted(mask_columns(tmp_path)) == ["mask/kept_1_1x1", "mask/kept_2_2x2"]

    def test_tensorboard_gets_an_image_at_the_interval(self, parts, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        agent = MaskPropagation(tiny_agent(parts, tensorboard_log=str(tmp_path), image_interval=2))
        agent.learn(3 * STEPS_A_ROLLOUT)
        (folder,) = tmp_path.iterdir()
        events = EventAccumulator(str(folder))
        events.Reload()
        images = events.Images("mask/propagated")
        assert [event.step for event in images] == [8, 24]  # images
        assert (images[0].width, images[0].height) == (4 * (192 + 4), 4 * (192 + 34))  # a sample and T masks

    def test_a_row_of_the_image_shows_all_its_suffixes(self, parts):
        agent = MaskPropagation(tiny_agent(parts, VMR, split=2, suffix_samples=3))
        rollout = boxed(agent.sample())
        sheet = agent.sheet(rollout, agent.masks(rollout), [1, 6])
        assert sheet.shape == (2 * (192 + 34), (3 + 3) * (192 + 4), 3)

    @pytest.mark.parametrize("cls", [GRPO, VMR])
    def test_no_image_is_drawn_in_vain(self, parts, tmp_path, cls):
        options = {"split": 2} if cls is VMR else {}
        silent = MaskPropagation(tiny_agent(parts, cls, tensorboard_log=str(tmp_path), image_interval=0, **options))
        unseen = MaskPropagation(tiny_agent(parts, cls, image_interval=1, **options))
        unseen.set_logger(csv_logger(tmp_path))
        for agent in (silent, unseen):
            agent.sheet = None  # would raise if it were called
            agent.learn(1)
