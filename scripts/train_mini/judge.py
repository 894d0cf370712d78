"""Read colour, shape and motion of the object back from the frames of a clip.

The judge knows the palette and the shapes of `world.py` and nothing of how the frames came to be,
so that it serves for procedural and for generated clips alike. `python -m scripts.train_mini.judge`
judges the judge: procedural clips under their own captions, and under those of the next clip, where
every rate must fall to chance.
"""

__all__ = [
    "Verdict",
    "check_judge",
    "compare_captions",
    "find_object",
    "judge_clip",
    "judge_motion",
    "judge_scenes",
    "judge_shape",
    "rate_verdicts",
    "score_clip",
    "shift_captions",
]

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .render import render_scene
from .world import COLOURS, DIRECTIONS, SEEDS, SHAPES, Scene, draw_scene

_REACH = 55.0  # grey levels of RGB distance within which a pixel has a colour
_MIN_AREA = 20  # pixels below which there is no object in a frame
_GOOD = 0.99  # share of procedural clips on which the judge has to be right
_CHANCE = 0.5  # share that it has to stay below under the captions of other clips
_TRACK = 17  # first frames: no object has bounced before
_STILL = 0.12  # pixels per frame below which an object stays
_FAR = 2.0  # pixels that a still object may be off its place in any frame

_TEMPLATES = {
    "circle": lambda u, v: u**2 + v**2 < 1,
    "square": lambda u, v: np.ones(np.broadcast_shapes(u.shape, v.shape), bool),
    "triangle": lambda u, v: 2 * abs(u) < v + 1,
    "cross": lambda u, v: np.minimum(abs(u), abs(v)) < 1 / 3,
}


@dataclass(frozen=True)
class Verdict:
    """What the frames show; "" where the judge sees no object.

    Attributes:
        colour: A key of `COLOURS`.
        shape: One of `SHAPES`.
        direction: A key of `DIRECTIONS` for an object that moves at first, else "".
        still: Whether the object keeps its place in all frames that were judged.
    """

    colour: str
    shape: str
    direction: str
    still: bool


def judge_clip(frames: NDArray[np.uint8], end: int = 0) -> Verdict:
    """Judge the largest object of a clip.

    Args:
        frames: shape (T, 64, 64, 3), uint8.
        end: Frames to look at, so as to stop at a cut; 0: all.
    """
    frames = frames[: end or None]
    colour, mask = find_object(frames)
    if not colour:
        return Verdict("", "", "", False)
    direction, still = judge_motion(mask)
    return Verdict(colour, judge_shape(mask), direction, still)


def find_object(frames: NDArray[np.uint8]) -> tuple[str, NDArray[np.bool_]]:
    """Return the colour that covers most, and where: shape (T, 64, 64); "" below 20 pixels."""
    palette = np.asarray(list(COLOURS.values()), np.float32)
    distance = np.linalg.norm(frames[..., None, :].astype(np.float32) - palette, axis=-1)
    has_colour = (distance < _REACH) & (distance == distance.min(-1, keepdims=True))
    areas = np.median(has_colour.sum((1, 2)), axis=0)
    best = int(areas.argmax())
    name = list(COLOURS)[best] if areas[best] >= _MIN_AREA else ""
    return name, has_colour[..., best]


def judge_shape(mask: NDArray[np.bool_]) -> str:
    """Return the shape whose template, stretched over the object's box, fits best on average.

    Args:
        mask: Where the object is, shape (T, 64, 64). Frames in which much of it is hidden do not
            count.
    """
    area = mask.sum((1, 2))
    scores = dict.fromkeys(SHAPES, 0.0)
    for frame in mask[area >= max(_MIN_AREA, 0.85 * np.quantile(area, 0.9))][::4]:
        (top, bottom), (left, right) = _find_box(frame)
        v = np.linspace(-1, 1, 2 * (bottom - top) + 1)[1::2, None]
        u = np.linspace(-1, 1, 2 * (right - left) + 1)[None, 1::2]
        inside = frame[top:bottom, left:right]
        for shape, template in _TEMPLATES.items():
            wanted = template(u, v)
            scores[shape] += (inside & wanted).sum() / (inside | wanted).sum()
    return max(scores, key=scores.__getitem__)


def _find_box(frame: NDArray[np.bool_]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (top, bottom), (left, right); lines with a single stray pixel do not count."""
    spans = []
    for axis in (1, 0):
        lines = np.flatnonzero(frame.sum(axis) >= 2)
        spans.append((int(lines[0]), int(lines[-1]) + 1) if len(lines) else (0, len(frame)))
    return spans[0], spans[1]


def judge_motion(mask: NDArray[np.bool_]) -> tuple[str, bool]:
    """Return the first direction ("" if none), and whether the object stays in all frames."""
    area = mask.sum((1, 2))
    seen = np.flatnonzero(area >= _MIN_AREA)
    grid = np.arange(mask.shape[1])
    centre = np.stack([(mask[seen].sum(axis) * grid).sum(1) for axis in (1, 2)], axis=1)
    centre = centre / area[seen, None]
    still = bool(np.linalg.norm(centre - np.median(centre, axis=0), axis=1).max() < _FAR)
    early = seen < _TRACK
    if early.sum() < 3:
        return "", still
    slope = np.polyfit(seen[early], centre[early], 1)[0]
    if np.linalg.norm(slope) < _STILL:
        return "", still
    return max(DIRECTIONS, key=lambda way: float(slope @ DIRECTIONS[way])), still


def score_clip(verdict: Verdict, scene: Scene) -> dict[str, bool]:
    """Compare a verdict with the caption of a scene of one object.

    Returns:
        `colour` and `shape` always; `direction` where the object should move, else `still`.
    """
    (actor,) = scene.actors
    way = actor.motion.partition(" ")[2]
    moves = {"direction": verdict.direction == way} if way else {"still": verdict.still}
    return {
        "colour": verdict.colour == actor.colour,
        "shape": verdict.shape == actor.shape,
        **moves,
    }


def rate_verdicts(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> dict[str, list[bool]]:
    """Return by attribute on which scenes of one object the verdicts are right."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for verdict, scene in zip(verdicts, scenes, strict=True):
        for attribute, right in score_clip(verdict, scene).items():
            hits[attribute].append(right)
    return hits


def shift_captions(scenes: Sequence[Scene]) -> list[Scene]:
    """Return to every clip the scene of the next: the negative control."""
    return [*scenes[1:], scenes[0]]


def compare_captions(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> str:
    """Rate verdicts under their own captions, and under those of the next clip: chance."""
    lines = []
    for name, order in (("own captions", scenes), ("next captions", shift_captions(scenes))):
        hits = sorted(rate_verdicts(verdicts, order).items())
        rates = ", ".join(f"{key} {np.mean(right):.1%} of {len(right)}" for key, right in hits)
        lines.append(f"  {name + ':':<19}{rates}")
    return "\n".join(lines)


def judge_scenes(clips: int) -> tuple[list[Verdict], list[Scene]]:
    """Judge procedural clips of one object; return verdicts and scenes."""
    scenes = [draw_scene(SEEDS["judge"] + index, "any", actors=1) for index in range(clips)]
    return [judge_clip(render_scene(scene).frames, scene.cut) for scene in scenes], scenes


def check_judge(clips: int) -> str:
    """Judge the judge on procedural clips; return its rates in words.

    Raises:
        SystemExit: It is wrong on more than a hundredth, or right under the captions of others.
    """
    verdicts, scenes = judge_scenes(clips)
    rates = f"judge, {clips} clips:\n{compare_captions(verdicts, scenes)}"
    if min(map(np.mean, rate_verdicts(verdicts, scenes).values())) < _GOOD:
        raise SystemExit(f"{rates}\nExpected to be right on {_GOOD:.0%} of them. Mend it first.")
    if max(map(np.mean, rate_verdicts(verdicts, shift_captions(scenes)).values())) >= _CHANCE:
        raise SystemExit(f"{rates}\nExpected chance under the next captions. Mend it first.")
    return rates


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=500)
    print(check_judge(parser.parse_args().clips))
