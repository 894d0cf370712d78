"""What the long jobs of this folder share: folder, process id, log, checkpoints.

A job is resumed by the command that started it: `load_training` finds what `save_training` left.
"""

__all__ = [
    "OUT",
    "THREADS",
    "begin_job",
    "cosine",
    "load_training",
    "log",
    "save_training",
    "trapezoid",
]

import math
import os
import time
from pathlib import Path

import torch
from torch import nn

OUT = Path(__file__).parents[2] / "out" / "train_mini"
THREADS = 2
_START = time.monotonic()


def begin_job() -> None:
    """Limit the threads and write the process id to `out/train_mini/pid`, for SIGSTOP and kill."""
    torch.set_num_threads(THREADS)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "pid").write_text(f"{os.getpid()}\n")


def log(**values: float) -> None:
    """Print one line of `name value` pairs after the seconds since the start."""
    pairs = (f"{name} {value:.5g}" for name, value in values.items())
    print(f"{time.monotonic() - _START:8.0f} s  " + "  ".join(pairs), flush=True)


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Return the factor of the learning rate: a linear warm-up, then half a cosine down to 2 %.

    Example:
        >>> [round(cosine(step, 1100), 2) for step in (0, 50, 100, 600, 1100)]
        [0.01, 0.51, 1.0, 0.51, 0.02]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def trapezoid(step: int, steps: int, first: int = 0, warmup: int = 100, end: float = 0.2) -> float:
    """Return the factor of the learning rate: a linear warm-up, a plateau, a linear end.

    Up to the end, `steps` does not matter: a training can be prolonged from there.

    Args:
        step: Number of the step, from 0.
        steps: Of the whole training.
        first: The step at which the optimizer began.
        warmup: Steps of the warm-up.
        end: Share of the steps in which the factor falls to zero.

    Example:
        >>> [round(trapezoid(step, 1000), 2) for step in (0, 49, 100, 799, 900, 999)]
        [0.01, 0.5, 1.0, 1.0, 0.5, 0.01]
    """
    return min(1.0, (step - first + 1) / warmup, (steps - step) / (end * steps))


def save_training(
    name: str, step: int, models: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer]
) -> None:
    """Write a checkpoint aside and rename it, so that a killed job leaves a whole one.

    Args:
        name: File in `OUT`.
        step: Steps done.
        models: What is trained, by name.
        optimizers: Theirs.
    """
    state = {
        "step": step,
        "models": {key: model.state_dict() for key, model in models.items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    aside = OUT / f"{name}.aside"
    torch.save(state, aside)
    aside.replace(OUT / name)


def load_training(
    name: str, models: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer]
) -> int:
    """Fill models and optimizers from a checkpoint and return its step; 0 where there is none."""
    path = OUT / name
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for key, model in models.items():
        model.load_state_dict(state["models"][key])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])
