"""Rotary tables against diffusers' own, whole windows and single chunks of them."""

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2RotaryPosEmbed
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_runtime.rope import BandRope, PowerRope


def axes_of(head_dim):
    side = 2 * (head_dim // 6)
    return (head_dim - 2 * side, side, side)


def diffusers_tables(frames, height, width, head_dim, theta):
    rope = SkyReelsV2RotaryPosEmbed(head_dim, (1, 2, 2), 64, theta)
    cos, sin = rope(torch.zeros(1, 1, frames, 2 * height, 2 * width))
    return cos[0, :, 0, 0::2].numpy(), sin[0, :, 0, 0::2].numpy()


@settings(deadline=None, max_examples=30)
@given(
    frames=st.integers(1, 12),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    head_dim=st.sampled_from([12, 16, 32, 64, 128]),
    theta=st.sampled_from([100.0, 10000.0]),
)
def test_a_window_equals_diffusers(frames, height, width, head_dim, theta):
    expected = diffusers_tables(frames, height, width, head_dim, theta)
    tables = PowerRope(axes_of(head_dim), theta, 64).tables(frames, height, width)
    for table, oracle in zip(tables, expected, strict=True):
        assert table.dtype == np.float32
        assert table.shape == (frames * height * width, head_dim // 2)
        np.testing.assert_allclose(table, oracle, rtol=0, atol=1e-7)


@given(chunk=st.integers(0, 4))
def test_a_chunk_is_its_rows_of_the_window(chunk):
    rope = PowerRope(axes_of(32), 10000.0, 64)
    window = rope.tables(25, 3, 4)
    part = rope.tables(5, 3, 4, first_frame=5 * chunk)
    rows = slice(5 * chunk * 12, 5 * (chunk + 1) * 12)
    assert all(np.array_equal(p, w[rows]) for p, w in zip(part, window, strict=True))


@pytest.mark.parametrize(
    ("size", "axis", "got"),
    [((5, 9, 4), "height", 9), ((5, 4, 9), "width", 9), ((5, 4, 4), "time", 10)],
)
def test_positions_the_model_does_not_know_are_refused(size, axis, got):
    with pytest.raises(ValueError) as error:
        rope = PowerRope(axes_of(32), 10000.0, 8)
        rope.tables(*size, first_frame=5 if axis == "time" else 0)
    assert str(error.value) == (
        f"rotary positions along {axis}: expected at most 8, got {got}. "
        "Generate a smaller video or shorter windows."
    )


def test_bands_are_those_of_the_published_formula():
    """Facts of MAGI-1: 45 x 45 tokens are scaled by (45/r - 1)/44 = 0.3409 with r = 45/16."""
    bands = 0.5, 2.0
    cos, sin = BandRope(bands).tables(2, 45, 45, first_frame=6)
    step = 15 / 44
    assert step == pytest.approx(0.3409, abs=1e-4)
    for frame, row, column in [(0, 0, 0), (1, 44, 22), (1, 3, 40)]:
        at = 6 + frame, (row - 22) * step, (column - 22) * step
        angles = np.array([place * band for place in at for band in bands])
        token = (frame * 45 + row) * 45 + column
        np.testing.assert_allclose(cos[token], np.cos(angles), atol=1e-6)
        np.testing.assert_allclose(sin[token], np.sin(angles), atol=1e-6)
