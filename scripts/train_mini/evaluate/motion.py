"""Whether motion weights find motion, in both measures, for every kind of scene."""

__all__ = ["has_cut", "has_pan", "measure_motion"]

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scripts.train_mini.render import render_scene
from scripts.train_mini.world import Scene

from mc_runtime import VideoPipeline

from .prompts import generate_prompts
from .records import Record, take_records
from .scenes import KINDS, Kind, held_out_scenes, kind_of
from .weights import force_weights, watch_scene

_CLIPS = 10
_SINGLE: tuple[Kind, ...] = ("slow", "fast")  # one object that moves, and nothing else
_HEADINGS = "a: given clips", "a: as published", "b: generated videos", "b: cut, pan"
_CUT_LEVELS, _CUT_SHARE = 15, 0.6  # a cut changes most pixels by this much from frame to frame
_PAN_FRAMES, _PAN_PIXELS = 16, (2, 6)  # a pan moves the picture by 4 pixels in 16 frames

Records = Mapping[str, Sequence[Record]]


def measure_motion(pipeline: VideoPipeline) -> str:
    """Return the areas under the ROC curve of both measures by kind, as a table.

    The generated videos of one object are those of `measure_prompts`.
    """
    generated: dict[Kind, list[Record]] = {kind: [] for kind in KINDS}
    for scene, record in generate_prompts(pipeline):
        generated[kind_of(scene)].append(record)
    given: dict[Kind, list[Record]] = {}
    for kind in KINDS:
        scenes = held_out_scenes(_CLIPS, kind)
        given[kind] = take_records(
            pipeline, f"given-{kind}", scenes, lambda *case: _force(pipeline, *case)
        )
        if not generated[kind]:
            generated[kind] = take_records(
                pipeline, f"generated-{kind}", scenes, lambda *case: _generate(pipeline, *case)
            )
    groups = {"one, moving": _SINGLE, **{kind: (kind,) for kind in KINDS}}
    rows = [
        _row(
            name,
            _average(given, kinds),
            _average(given, kinds, "output_area"),
            _average(generated, kinds),
            _check(generated, kinds),
        )
        for name, kinds in groups.items()
    ]
    heading = (
        "area under the ROC curve of motion weights, after the warm-up: mean over the clips in "
        "which some tokens move and some do not (how many these are)"
    )
    return "\n".join([heading, _row("", *_HEADINGS), *rows])


def _force(pipeline: VideoPipeline, seed: int, scene: Scene) -> Record:
    clip = render_scene(scene)
    latents = pipeline.encoder.encode(clip.frames)
    return dict(force_weights(pipeline, latents, scene.caption(), clip.moving, seed))


def _generate(pipeline: VideoPipeline, seed: int, scene: Scene) -> Record:
    frames, area = watch_scene(pipeline, seed, scene)
    return {"area": area, "cut": has_cut(frames), "pan": has_pan(frames)}


def has_cut(frames: NDArray[np.uint8]) -> bool:
    """Say whether most pixels change at once between two frames."""
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=-1) > _CUT_LEVELS
    return bool((change.mean(axis=(1, 2)) > _CUT_SHARE).any())


def has_pan(frames: NDArray[np.uint8]) -> bool:
    """Say whether the picture slides sideways in the first frames, by about what a pan does."""
    first, later = frames[[0, _PAN_FRAMES]].astype(float).mean(axis=-1)
    low, high = _PAN_PIXELS
    shifts = range(-high, high + 1)
    width = first.shape[1] - 2 * high
    errors = [
        np.abs(later[:, high + shift :][:, :width] - first[:, high:][:, :width]).mean()
        for shift in shifts
    ]
    return bool(low <= abs(shifts[int(np.argmin(errors))]))


def _average(records: Records, kinds: Sequence[Kind], name: str = "area") -> str:
    areas = [record[name] for kind in kinds for record in records[kind]]
    known = [area for area in areas if area is not None]
    return f"{np.mean(known):.3f} ({len(known)} of {len(areas)})" if known else "all or nothing"


def _check(records: Records, kinds: Sequence[Kind]) -> str:
    """How many videos of a kind show what only that kind has."""
    (kind, *others) = kinds
    if others or kind not in ("cut", "pan"):
        return ""
    return f"{sum(record[kind] for record in records[kind])} of {len(records[kind])}"


def _row(kind: str, *cells: str) -> str:
    return f"{kind:>12}" + "".join(f"{cell:>24}" for cell in cells)
