"""Distances of steps and rows, against the modulation itself."""

import numpy as np
import torch

from motioncache import DistanceTable, choose_policy
from motioncache.distance import rescale

# Made of what the modulation of a real model is like: smooth in the step.
MODULATION = np.cumsum(np.random.default_rng(0).normal(size=(9, 6, 16)), axis=0).astype(np.float32)


def relative_l1(now, before):
    now, before = torch.from_numpy(now), torch.from_numpy(before)
    return ((now - before).abs().mean() / before.abs().mean()).item()


def test_a_step_against_torch():
    table = DistanceTable.from_modulation(MODULATION)
    for step in range(1, 9):
        expected = relative_l1(MODULATION[step], MODULATION[step - 1])
        assert abs(table.of_step(step) - expected) < 1e-6 * expected
    assert not table.of_step(0)


def test_a_row_is_the_distance_of_all_its_frames_at_once():
    table = DistanceTable.from_modulation(MODULATION)
    now, before = MODULATION[[7, 2]], MODULATION[[6, 1]]
    assert abs(table.of_row([7, 2, 0]) - relative_l1(now, before)) < 1e-6
    assert not table.of_row([0])


def test_the_published_polynomial_is_negative_on_both_sides():
    """Where the published code takes distance away: below 0.0043 and above 0.1019."""
    policy = choose_policy("motioncache:published", (), "skyreels", "skyreels-df-1.3b-540p", {})
    published = policy.config.coefficients
    signs = [rescale(published, x, clamp=False) > 0 for x in (0.004, 0.005, 0.1, 0.103, 0.2)]
    assert signs == [False, True, True, False, False]
    assert [rescale(published, x, clamp=True) for x in (0.004, 0.2)] == [0.0, 0.0]
