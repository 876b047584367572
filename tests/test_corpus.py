from collections import Counter
from itertools import product

import numpy as np
import pytest

from var_env.corpus import count_regions, filter_regions, largest_quotas, region_histogram
from var_env.scenes import TARGET_REGIONS, World


def corpus(counts, seed=0):
    """Prompts, all different, in mixed order: ``counts[c]`` of them with c regions."""
    texts = {c: " and ".join(f'"T{k}"' for k in range(c)) for c in counts}
    prompts = [f"image {i} of {texts[c]}" for c, n in counts.items() for i in range(n)]
    return [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))]


def largest_naive(shares, available):
    """The largest sum of any quotas that all lie less than one away from their share of it."""
    return max(
        sum(quotas)
        for quotas in product(*(range(available[count] + 1) for count in shares))
        if all(abs(q - share * sum(quotas)) < 1 - 1e-6 for q, share in zip(quotas, shares.values(), strict=True))
    )


@pytest.mark.parametrize(
    ("prompt", "regions"),
    [
        ("a red wall", 0),
        ('a sign that says "RUN"', 1),
        ('"GO NOW" above "BIG"', 2),  # a region is a text and not a word
        ('"" and " " and "A"', 1),
        ('an "open quote and "', 1),
        ('"A" "B" "C" "D" "E" "F"', 6),
    ],
)
def test_count_regions(prompt, regions):
    assert count_regions(prompt) == regions


def test_the_count_is_that_of_the_world():
    world, rng = World(size=128, regions="target"), np.random.default_rng(0)
    assert all(count_regions(scene.prompt) == len(scene.words) for scene in (world.sample(rng) for _ in range(100)))


def test_histogram_has_the_papers_bins():
    prompts = corpus({0: 3, 1: 7, 3: 2, 6: 1, 9: 4})
    assert region_histogram(prompts) == {1: 7, 2: 0, 3: 2, 4: 0, 5: 0, ">5": 5}
    assert list(region_histogram([])) == [1, 2, 3, 4, 5, ">5"]


class TestFilter:
    def test_the_papers_case(self):
        """Far too many single regions and a long tail; the scarcest bin is used up and decides."""
        prompts = corpus({0: 5, 1: 500, 2: 90, 3: 60, 4: 33, 5: 40, 6: 20, 8: 9})
        kept = filter_regions(prompts)
        assert region_histogram(kept) == {1: 0, 2: 23, 3: 34, 4: 33, 5: 23, ">5": 0}  # of 113: 22.6, 33.9, 33.9, 22.6
        assert filter_regions(prompts, "target") == kept

    def test_a_subset_in_the_corpuss_order(self):
        prompts = corpus({1: 50, 2: 9, 3: 8, 4: 7, 5: 6})
        kept = filter_regions(prompts, seed=3)
        assert kept == [prompt for prompt in prompts if prompt in set(kept)]

    def test_chosen_by_the_seed(self):
        prompts = corpus({2: 40, 3: 40, 4: 40, 5: 10})
        assert filter_regions(prompts, seed=1) == filter_regions(prompts, seed=1) != filter_regions(prompts, seed=2)
        seen = Counter(prompt for seed in range(200) for prompt in filter_regions(prompts, seed=seed))
        twos = [seen[prompt] for prompt in prompts if count_regions(prompt) == 2]  # about 10 of the 40, each time
        assert min(twos) > 20 and max(twos) < 90

    def test_duplicates_stay_as_they_are(self):
        prompts = ['"A" "B"'] * 4 + ['"A"'] * 3 + ['"A" "B"'] * 2
        assert filter_regions(prompts, {1: 1 / 3, 2: 2 / 3}) == prompts
        assert filter_regions(prompts, {2: 1.0}) == ['"A" "B"'] * 6

    def test_a_share_of_zero_asks_for_nothing(self):
        prompts = corpus({1: 3, 2: 4})
        assert filter_regions(prompts, {1: 0.0, 2: 1.0, 3: 0.0}) == [p for p in prompts if count_regions(p) == 2]

    @pytest.mark.parametrize("available", [{2: 3, 3: 1, 5: 2}, {}])
    def test_an_empty_bin(self, available):
        empty = min(set(TARGET_REGIONS) - set(available))
        with pytest.raises(ValueError, match=f"no prompt of the corpus has {empty} regions.*the corpus has {{1: 4"):
            filter_regions(corpus({1: 4, **available}))

    @pytest.mark.parametrize("profile", [{2: 0.5, 3: 0.6}, {2: 1.5, 3: -0.5}, {}])
    def test_a_profile_that_is_none(self, profile):
        with pytest.raises(ValueError, match="sum to 1"):
            filter_regions(corpus({2: 3, 3: 3}), profile)


class TestQuotas:
    def check(self, shares, available):
        quotas = largest_quotas(shares, available)
        total = sum(quotas.values())
        assert total == largest_naive(shares, available), (shares, available)
        for count, share in shares.items():
            assert quotas[count] <= available[count] and abs(quotas[count] - share * total) < 1

    def test_nothing_larger_exists(self):
        rng = np.random.default_rng(0)
        for _ in range(60):
            self.check(TARGET_REGIONS, {count: int(rng.integers(1, 9)) for count in TARGET_REGIONS})

    def test_nothing_larger_exists_for_any_profile(self):
        rng = np.random.default_rng(1)
        for _ in range(60):
            size = int(rng.integers(1, 4))
            shares = dict(enumerate(rng.dirichlet(np.ones(size)).tolist(), 1))
            self.check(shares, {count: int(rng.integers(1, 16)) for count in shares})

    def test_exact_where_it_can_be(self):
        assert largest_quotas(TARGET_REGIONS, {2: 20, 3: 30, 4: 30, 5: 20}) == {2: 20, 3: 30, 4: 30, 5: 20}
        assert largest_quotas({1: 0.29, 2: 0.71}, {1: 29, 2: 71}) == {1: 29, 2: 71}  # 0.29 * 100 < 29 in floats
        assert largest_quotas({1: 1 / 3, 2: 1 / 3, 3: 1 / 3}, {1: 7, 2: 7, 3: 7}) == {1: 7, 2: 7, 3: 7}
