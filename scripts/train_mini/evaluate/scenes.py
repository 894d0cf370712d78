"""Held-out scenes by kind: which prompts are measured."""

__all__ = ["KINDS", "Kind", "held_out_scenes", "kind_of"]

from itertools import count, islice
from typing import Literal, get_args

from scripts.train_mini.world import SEEDS, Scene, draw_scene

Kind = Literal["static", "slow", "fast", "pan", "cut", "two"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_VERBS: dict[str, Kind] = {"stays": "static", "drifts": "slow", "races": "fast"}


def kind_of(scene: Scene) -> Kind:
    """Return which kind a scene is of, by what is hardest in it."""
    if scene.cut:
        return "cut"
    if scene.pan:
        return "pan"
    if len(scene.actors) > 1:
        return "two"
    return _VERBS[scene.actors[0].motion.partition(" ")[0]]


def held_out_scenes(number: int, kind: Kind | None = None) -> list[Scene]:
    """Return held-out scenes: of one object and nothing else, or of a kind.

    Args:
        number: How many.
        kind: None for plain scenes of one object, whatever it does.
    """
    if kind is None:
        seeds = range(SEEDS["prompts"], SEEDS["prompts"] + number)
        return [draw_scene(seed, "held_out", actors=1, plain=True) for seed in seeds]
    actors = 2 if kind == "two" else 1
    drawn = (draw_scene(seed, "held_out", actors=actors) for seed in count(SEEDS["kinds"]))
    return list(islice((scene for scene in drawn if kind_of(scene) == kind), number))
