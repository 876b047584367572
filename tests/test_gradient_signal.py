"""The cosine between gradients of independent batches, and its error, on gradients whose cosine is known."""

import numpy as np
import pytest
import torch
from tiny import tiny_agent

from agents.experiments.gradient_signal import batch_gradient, cosine_matrix, mean_cosine, signal_gates
from agents.experiments.jackknife import jackknife_error


def synthetic(cosine, batches, seed, size=2000):
    """Gradients of a common direction and noise of their own, whose mean cosine is ``cosine``, nearly."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(batches, size, generator=rng)
    noise[:, 0] = (cosine / (1 - cosine) * size) ** 0.5
    return list(noise)


class TestJackknife:
    def test_of_a_mean_is_its_standard_error(self):
        values = np.random.default_rng(0).normal(size=9)
        left_out = [np.delete(values, i).mean() for i in range(9)]
        assert jackknife_error(left_out) == pytest.approx(values.std(ddof=1) / 3)

    def test_of_fewer_than_two(self):
        assert np.isnan(jackknife_error([0.5]))


class TestMeanCosine:
    def test_is_the_mean_over_pairs_and_without_each_batch_in_turn(self):
        cosines = cosine_matrix(synthetic(0.3, 6, 0, size=20))
        pairs = np.triu_indices(6, 1)
        left_out = [np.delete(np.delete(cosines, i, 0), i, 1)[np.triu_indices(5, 1)].mean() for i in range(6)]
        mean, error = mean_cosine(cosines)
        assert mean == pytest.approx(cosines[pairs].mean()) and error == pytest.approx(jackknife_error(left_out))

    def test_cosines(self):
        first, second = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0])
        expected = [[1, 0.5**0.5, 0], [0.5**0.5, 1, 0], [0, 0, 0]]
        np.testing.assert_allclose(cosine_matrix([first, second, torch.zeros(2)]), expected, atol=1e-6)

    @pytest.mark.parametrize("cosine", [0.0, 0.05, 0.4])
    def test_known_cosine(self, cosine):
        mean, error = mean_cosine(cosine_matrix(synthetic(cosine, 12, 0, 20_000)))
        assert mean == pytest.approx(cosine, abs=0.01) and 0 < error < 0.01

    def test_the_error_is_what_trials_show(self):
        """The batches' signal differs in strength, as that of real prompts does, so that pairs go together."""
        found, of_pairs = [], []
        for trial in range(200):
            gradients = synthetic(0.4, 10, trial, 400)
            for gradient, strength in zip(gradients, np.random.default_rng(trial).normal(1, 0.5, 10), strict=True):
                gradient[0] *= strength
            cosines = cosine_matrix(gradients)
            pairs = cosines[np.triu_indices(10, 1)]
            found.append(mean_cosine(cosines))
            of_pairs.append(pairs.std() / len(pairs) ** 0.5)
        means, errors = np.array(found).T
        assert errors.mean() == pytest.approx(means.std(), rel=0.25)
        assert np.mean(of_pairs) < 0.7 * means.std()

    def test_without_signal_the_error_is_too_large_by_the_root_of_two_at_most(self):
        found = np.array([mean_cosine(cosine_matrix(synthetic(0.0, 10, trial, 200))) for trial in range(200)])
        assert abs(found[:, 0].mean()) < 3 * found[:, 0].std() / 200**0.5
        assert 1.0 < np.mean(found[:, 1]) / found[:, 0].std() < 1.6


class TestGates:
    def test_met(self):
        assert [gate.met for gate in signal_gates(0.06, 0.009, 8, 64)] == [True, True]

    def test_too_few_batches(self):
        first, second = signal_gates(0.04, 0.02, 8, 64)
        assert not first.met and not second.met and second.name.endswith("; 8 are too few, try 32")


def test_gradient_of_a_batch_leaves_the_temperatures_out(parts):
    agent = tiny_agent(parts, kl_coef=0.0)
    others = sum(weight.numel() for name, weight in agent.policy.named_parameters() if name != "sharpness")
    gradient = batch_gradient(agent)
    assert gradient.shape == (others,) and gradient.isfinite().all() and gradient.norm() > 0
