"""The procedural world: what happens in a clip, and the sentence that says so.

A `Scene` is drawn from a seed; `render.render_scene` turns it into frames and a moving mask, and
`judge.py` reads its attributes back from frames. Every scene is a plain value: the same seed gives
the same scene and the same caption on every machine.
"""

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "DIRECTIONS",
    "MOTIONS",
    "PANS",
    "RADII",
    "SEEDS",
    "SHAPES",
    "SIZE",
    "SPEEDS",
    "Actor",
    "Combination",
    "Scene",
    "Split",
    "draw_scene",
    "is_held_out",
]

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

SIZE = 64  # pixels, both ways

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 190, 60),
    "blue": (45, 70, 220),
    "yellow": (235, 215, 50),
    "purple": (170, 50, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
RADII = {"small": 8.0, "big": 12.0}  # pixels, half of the shape's extent
BACKGROUNDS = ("sand", "grass", "water", "bricks", "checker", "stripes")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"stays": 0.0, "drifts": 0.35, "races": 1.1}  # pixels per frame
MOTIONS = ("stays", *(f"{verb} {way}" for verb in ("drifts", "races") for way in DIRECTIONS))
PANS = {"left": 0.25, "right": -0.25}  # shift of the picture to the right, pixels per frame

# The first seed of each use. None reaches another's, so that nothing is judged on what it was made
# from: training (`clips`, `beginnings`), the VAE's progress, the judge, development (`samples`),
# calibration, and what the model card says (`prompts`, `kinds`).
SEEDS = {
    "clips": 0,
    "beginnings": 100_000,
    "vae": 1_000_000,
    "judge": 2_000_000,
    "prompts": 3_000_000,
    "kinds": 4_000_000,
    "calibration": 5_000_000,
    "samples": 6_000_000,
}

Split = Literal["train", "held_out", "any"]
Combination = tuple[str, str, str, str]


def is_held_out(combination: Combination) -> bool:
    """Return whether a combination (shape, colour, motion, background) is kept from training.

    A stable hash picks 10 % of them: sha256 of the words, modulo 10.
    """
    digest = hashlib.sha256("/".join(combination).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


@dataclass(frozen=True)
class Actor:
    """One object.

    Attributes:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        size: One of `RADII`.
        motion: One of `MOTIONS`.
        start: Centre in frame 0, (x, y) in pixels.
        restart: Centre in the first frame after a cut, (x, y) in pixels.
    """

    shape: str
    colour: str
    size: str
    motion: str
    start: tuple[float, float]
    restart: tuple[float, float]

    @property
    def radius(self) -> float:
        """Half of the shape's extent, in pixels."""
        return RADII[self.size]

    @property
    def velocity(self) -> tuple[float, float]:
        """Velocity before the first bounce, (x, y) in pixels per frame."""
        verb, _, way = self.motion.partition(" ")
        x, y = DIRECTIONS.get(way, (0, 0))
        return SPEEDS[verb] * x, SPEEDS[verb] * y

    def phrase(self) -> str:
        """Return the words of the caption for this object."""
        return f"a {self.size} {self.colour} {self.shape} {self.motion}"


@dataclass(frozen=True)
class Scene:
    """Everything that a clip shows.

    Attributes:
        actors: One or two objects; the later one passes before the earlier one.
        backgrounds: One kind, or two where there is a cut.
        pan: "" for a still camera, or a key of `PANS`: where the camera turns.
        cut: First frame of the second background; 0 where there is no cut.
        seed: Of the textures.
    """

    actors: tuple[Actor, ...]
    backgrounds: tuple[str, ...]
    pan: str
    cut: int
    seed: int

    def caption(self) -> str:
        """Return the sentence of the grammar that describes the scene."""
        actors = " and ".join(actor.phrase() for actor in self.actors)
        cut = f" then cut to {self.backgrounds[1]}" if self.cut else ""
        pan = f" while the camera pans {self.pan}" if self.pan else ""
        return f"{actors} over {self.backgrounds[0]}{pan}{cut}"

    def is_plain(self) -> bool:
        """Return whether there is one object, and neither pan nor cut."""
        return len(self.actors) == 1 and not self.pan and not self.cut

    def combinations(self) -> list[Combination]:
        """Return every (shape, colour, motion, background) that is seen in the clip."""
        return [
            (actor.shape, actor.colour, actor.motion, background)
            for actor in self.actors
            for background in self.backgrounds
        ]


def draw_scene(
    seed: int, split: Split = "train", *, actors: int | None = None, plain: bool = False
) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: The same seed and arguments give the same scene.
        split: `train` has no held-out combination, `held_out` nothing else, `any` whatever comes.
        actors: Number of objects; None: two in 30 % of the scenes.
        plain: No pan and no cut; otherwise 12 % of the scenes pan and 8 % have one cut.
    """
    rng = np.random.default_rng(seed)
    while True:
        scene = _draw_any(rng, actors, plain)
        held_out = [is_held_out(combination) for combination in scene.combinations()]
        if split == "any" or (all(held_out) if split == "held_out" else not any(held_out)):
            return scene


def _draw_any(rng: np.random.Generator, actors: int | None, plain: bool) -> Scene:
    count = actors if actors is not None else 1 + int(rng.random() < 0.3)
    kind = rng.random()
    pans, cuts = not plain and kind < 0.12, not plain and 0.12 <= kind < 0.2
    backgrounds = rng.permutation(BACKGROUNDS)[: 1 + int(cuts)]
    colours = rng.permutation(list(COLOURS))[:count]
    return Scene(
        actors=tuple(_draw_actor(rng, str(colour)) for colour in colours),
        backgrounds=tuple(str(background) for background in backgrounds),
        pan=str(rng.choice(list(PANS))) if pans else "",
        cut=int(rng.integers(30, 67)) if cuts else 0,
        seed=int(rng.integers(2**31)),
    )


def _draw_actor(rng: np.random.Generator, colour: str) -> Actor:
    size = str(rng.choice(list(RADII)))
    # A fifth stay: drawn evenly, eight of nine would move.
    motion = "stays" if rng.random() < 0.2 else str(rng.choice(MOTIONS[1:]))
    start, restart = (_draw_centre(rng, RADII[size], motion) for _ in range(2))
    return Actor(str(rng.choice(SHAPES)), colour, size, motion, start, restart)


def _draw_centre(rng: np.random.Generator, radius: float, motion: str) -> tuple[float, float]:
    """Draw a centre from which a moving object has room for 18 frames before its first bounce."""
    way = DIRECTIONS.get(motion.partition(" ")[2], (0, 0))
    centre = [0.0, 0.0]
    for axis, step in enumerate(way):
        low, high = radius + 2, SIZE - radius - 2
        middle = (low + high) / 2
        low, high = (low, middle) if step > 0 else (middle, high) if step < 0 else (low, high)
        centre[axis] = float(rng.uniform(low, high))
    return centre[0], centre[1]
