"""Bounds of every symbol from the largest video, against sizes worked out by hand."""

import pytest

from mc_engines.building.bounds import (
    Bounds,
    VideoLimits,
    bound_symbols,
    bound_tensor,
    bucket_symbols,
)
from mc_engines.specs import TensorSpec

WAN = {"transformer": {"patch_size": [1, 2, 2]}}
MINI = WAN | {
    "vae": {"spatial_factor": 4, "temporal_factor": 4},
    "text_encoder": {"max_tokens": 77},
}


@pytest.mark.parametrize(
    ("config", "limits", "expected"),
    [
        # 540P: 68 x 120 latents, 34 x 60 = 2040 tokens a frame, 25 latent frames of 97.
        (WAN, VideoLimits(544, 960, 97, 5), (10200, 51000, 5, 2040, 512, 68, 120)),
        # 720P, 121 frames: 31 latent frames; 45 x 80 = 3600 tokens a frame.
        (WAN, VideoLimits(720, 1280, 121, 5), (18000, 111600, 5, 3600, 512, 90, 160)),
        (MINI, VideoLimits(64, 64, 97, 5), (320, 1600, 5, 64, 77, 16, 16)),
    ],
)
def test_the_largest_sizes_are_those_of_the_video(config, limits, expected) -> None:
    symbols = bound_symbols(config, limits)
    assert tuple(symbols[name].most for name in ("K", "S", "F", "P", "T", "h", "w")) == expected
    assert symbols["L"] == symbols["K"] and symbols["M"] == symbols["S"]
    assert all(each.least <= each.usual <= each.most for each in symbols.values())


def test_a_shape_is_bounded_symbol_by_symbol() -> None:
    symbols = {"K": Bounds(1, 20, 30), "h": Bounds(2, 16, 16)}
    spec = TensorSpec("x", "float16", (1, "K", 3, "8*h"))
    assert bound_tensor(spec, symbols) == ((1, 1, 3, 16), (1, 20, 3, 128), (1, 30, 3, 128))


def test_a_bucket_fixes_the_recomputed_tokens_rounded_up() -> None:
    symbols = bound_symbols(MINI, VideoLimits(64, 64, 97, 5))
    assert bucket_symbols(symbols, 0.3)["K"] == Bounds(96, 96, 96)
    assert bucket_symbols(symbols, 0.3)["L"] == symbols["L"]
    assert bucket_symbols(symbols, 0.001)["K"].most == 1


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            VideoLimits(540, 960, 97, 5),
            "height: expected a multiple of 16, got 540. Use 528 or 544.",
        ),
        (VideoLimits(544, 8, 97, 5), "width: expected a multiple of 16, got 8. Use 16."),
        (VideoLimits(0, 960, 97, 5), "height: expected a multiple of 16, got 0. Use 16."),
        (VideoLimits(-16, 960, 97, 5), "height: expected a multiple of 16, got -16. Use 16."),
        (VideoLimits(544, 960, 97, 0), "causal_block_size: expected at least 1, got 0. Raise it."),
        (
            VideoLimits(544, 960, -9, 5),
            "max_frames: expected at least 17, a chunk of 5 latent frames, got -9. Raise it.",
        ),
        (
            VideoLimits(544, 960, 13, 5),
            "max_frames: expected at least 17, a chunk of 5 latent frames, got 13. Raise it.",
        ),
    ],
)
def test_sizes_that_no_model_has_are_refused(limits, message) -> None:
    with pytest.raises(ValueError) as error:
        bound_symbols(WAN, limits)
    assert str(error.value) == message


def test_a_symbol_without_bounds_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        bound_tensor(TensorSpec("x", "float16", ("Q",)), {"K": Bounds(1, 1, 1)})
    assert str(error.value) == (
        "tensor 'x': expected sizes of K, got 'Q'. Export the bundle again with this version."
    )
