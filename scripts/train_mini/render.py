"""Draw a scene: frames, and the mask of what truly moves.

Everything is computed for all frames at once from signed distances, so that edges are smooth and
motion is exact below a pixel. Next door: `world.py` (what a scene is) and `judge.py`.
"""

__all__ = ["Clip", "cover_objects", "render_scene", "trace_path"]

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .world import COLOURS, PANS, SIZE, Actor, Scene

Field = NDArray[np.float32]
_MARGIN = 40  # pixels of texture beside the picture: what a pan uncovers
_SQUARE = 0.85  # a square's half side, so that it covers about as much as the other shapes


@dataclass(frozen=True)
class Clip:
    """A rendered scene.

    Attributes:
        frames: shape (T, 64, 64, 3), uint8.
        moving: Pixels whose content moves between the frame before and this one, shape
            (T, 64, 64), bool; frame 0 looks ahead instead. All pixels in a pan and at a cut.
    """

    frames: NDArray[np.uint8]
    moving: NDArray[np.bool_]


def render_scene(scene: Scene, frames: int = 97) -> Clip:
    """Render a scene.

    Args:
        scene: What to show.
        frames: T, any number.
    """
    times = np.arange(frames)
    picture = _draw_backgrounds(scene, times)
    moving = np.zeros((frames, SIZE, SIZE), bool)
    for actor in scene.actors:
        coverage = _cover(actor, trace_path(actor, frames, scene.cut))[..., None]
        picture = picture * (1 - coverage) + np.asarray(COLOURS[actor.colour]) * coverage
        if actor.motion != "stays":
            moving |= _sweep(coverage[..., 0] > 0)
    if scene.pan:
        moving[:] = True
    if 0 < scene.cut < frames:
        moving[scene.cut] = True
    return Clip(np.clip(np.rint(picture), 0, 255).astype(np.uint8), moving)


def cover_objects(scene: Scene, frames: int) -> Field:
    """Return how much of each pixel the objects cover, shape (T, 64, 64), 0 to 1."""
    covers = [_cover(actor, trace_path(actor, frames, scene.cut)) for actor in scene.actors]
    return np.maximum.reduce(covers)


def trace_path(actor: Actor, frames: int, cut: int = 0) -> NDArray[np.float64]:
    """Return the centre of an object in each frame, shape (T, 2), (x, y) in pixels.

    Objects bounce off the walls of the picture; after a cut (its first frame, 0 for none) they
    begin anew from `restart`.

    Example:
        >>> from scripts.train_mini.world import Actor
        >>> actor = Actor("circle", "red", "small", "races left", (20.0, 30.0), (30.0, 30.0))
        >>> trace_path(actor, 13)[[0, 10, 12], 0].round(1).tolist()
        [20.0, 9.0, 9.2]
    """
    times = np.arange(frames)[:, None]
    after = (times >= cut) & (cut > 0)
    start = np.where(after, actor.restart, actor.start)
    elapsed = np.where(after, times - cut, times)
    low, high = actor.radius, SIZE - actor.radius
    period = 2 * (high - low)
    folded = (start + elapsed * np.asarray(actor.velocity) - low) % period
    return low + np.minimum(folded, period - folded)


def _sweep(covered: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return what an object covers in each frame or in the one before (the first: after)."""
    before = np.concatenate([covered[1:2], covered[:-1]]) if len(covered) > 1 else covered
    return covered | before


def _cover(actor: Actor, path: NDArray[np.float64]) -> Field:
    """Return how much of each pixel an object covers, shape (T, 64, 64), 0 to 1."""
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    x = (grid[None, None, :] - path[:, 0, None, None]).astype(np.float32)
    y = (grid[None, :, None] - path[:, 1, None, None]).astype(np.float32)
    distance = _DISTANCES[actor.shape](x, y, actor.radius)
    return np.clip(0.5 - distance, 0, 1)


def _circle(x: Field, y: Field, radius: float) -> Field:
    return np.hypot(x, y) - radius


def _square(x: Field, y: Field, radius: float) -> Field:
    return np.maximum(abs(x), abs(y)) - _SQUARE * radius


def _triangle(x: Field, y: Field, radius: float) -> Field:
    slope = (2 * abs(x) - (y + radius)) / np.float32(5**0.5)
    return np.maximum(slope, y - radius)


def _cross(x: Field, y: Field, radius: float) -> Field:
    far, near = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return np.maximum(far - radius, near - radius / 3)


_DISTANCES: dict[str, Callable[[Field, Field, float], Field]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


def _draw_backgrounds(scene: Scene, times: NDArray[np.int64]) -> Field:
    """Return the backgrounds of all frames, shape (T, 64, 64, 3), 0 to 255."""
    second = (times >= scene.cut) & (scene.cut > 0)
    out = np.empty((len(times), SIZE, SIZE, 3), np.float32)
    for index, kind in enumerate(scene.backgrounds):
        rng = np.random.default_rng([scene.seed, index])
        texture = _TEXTURES[kind](rng).astype(np.float32)
        chosen = np.flatnonzero(second == bool(index))
        shift = PANS[scene.pan] * times[chosen] if scene.pan else np.zeros(len(chosen))
        out[chosen] = _slide(texture, shift)
    return out


def _slide(texture: Field, shift: NDArray[np.float64]) -> Field:
    """Cut a window per frame out of a wide texture (it repeats), moved by `shift` pixels."""
    width = texture.shape[1]
    left = np.arange(SIZE)[None] + _MARGIN - shift[:, None]
    whole = np.floor(left).astype(np.int64)
    part = (left - whole).astype(np.float32)[:, None, :, None]
    first, second = (np.moveaxis(texture[:, (whole + k) % width], 0, 1) for k in (0, 1))
    return first * (1 - part) + second * part


def _smooth_noise(rng: np.random.Generator, wide: float, high: float) -> Field:
    """Return noise of unit variance, smoothed over `wide` x `high` pixels, periodic both ways."""
    shape = (SIZE, SIZE + 2 * _MARGIN)
    fy, fx = np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])[None]
    low_pass = np.exp(-2 * np.pi**2 * ((fx * wide) ** 2 + (fy * high) ** 2))
    smooth = np.fft.ifft2(np.fft.fft2(rng.standard_normal(shape)) * low_pass).real
    return ((smooth - smooth.mean()) / smooth.std()).astype(np.float32)


def _tint(colour: tuple[int, int, int], shade: Field) -> Field:
    """Return a colour, lightened by `shade` grey levels, shape (64, width, 3)."""
    return np.asarray(colour, np.float32) + shade[..., None]


def _axes(rng: np.random.Generator, period: int) -> tuple[Field, Field]:
    """Return y and x of the wide texture, each begun at a random multiple of 4 pixels."""
    y, x = np.mgrid[:SIZE, : SIZE + 2 * _MARGIN].astype(np.float32)
    start = 4 * rng.integers(0, period // 4, 2)
    return y + start[0], x + start[1]


def _sand(rng: np.random.Generator) -> Field:
    return _tint((190, 165, 120), 7 * _smooth_noise(rng, 1.6, 1.6))


def _grass(rng: np.random.Generator) -> Field:
    return _tint((75, 95, 60), 8 * _smooth_noise(rng, 1.3, 3.5))


def _water(rng: np.random.Generator) -> Field:
    return _tint((95, 130, 150), 8 * _smooth_noise(rng, 5.0, 1.5))


def _bricks(rng: np.random.Generator) -> Field:
    y, x = _axes(rng, 16)
    row = y // 8
    mortar = (y % 8 < 2) | ((x + 8 * (row % 2)) % 16 < 2)
    return _tint((135, 85, 70), np.where(mortar, 30, 0) + 2 * _smooth_noise(rng, 2, 2))


def _checker(rng: np.random.Generator) -> Field:
    y, x = _axes(rng, 16)
    return _tint((110, 110, 115), 14 * np.where((x // 8 + y // 8) % 2 > 0, 1, -1))


def _stripes(rng: np.random.Generator) -> Field:
    _, x = _axes(rng, 16)
    return _tint((60, 55, 70), 16 * np.sin(2 * np.pi * x / 16))


_TEXTURES: dict[str, Callable[[np.random.Generator], Field]] = {
    "sand": _sand,
    "grass": _grass,
    "water": _water,
    "bricks": _bricks,
    "checker": _checker,
    "stripes": _stripes,
}
