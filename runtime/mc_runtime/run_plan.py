"""What a run will do, known before anything is computed: windows, rows, sizes.

Neighbours: `plan_windows` and `step_matrix` are put together here; the policy is checked against
the shape, `generate_chunks` follows the plan, `mc_runtime.flops` counts it.
"""

__all__ = ["RunPlan", "plan_run"]

from dataclasses import dataclass

import numpy as np

from mc_runtime.options import GenerationOptions
from mc_runtime.schedule import (
    WAN_GRID,
    LatentGrid,
    StepMatrix,
    Window,
    plan_windows,
    step_matrix,
)
from motioncache import RunShape


@dataclass(frozen=True)
class RunPlan:
    """The order of work of a whole run.

    Attributes:
        windows: In the order of time.
        matrices: Which chunk takes which step in which row, per window.
        shape: What a policy may know of it.
        token_grid: Tokens of a latent frame along height and width.
    """

    windows: tuple[Window, ...]
    matrices: tuple[StepMatrix, ...]
    shape: RunShape
    token_grid: tuple[int, int]


def plan_run(
    options: GenerationOptions, prefix_latent_frames: int = 0, grid: LatentGrid = WAN_GRID
) -> RunPlan:
    """Lay out the windows of a run and the steps of their chunks.

    Args:
        options: Accepted by `validate_options` with the same prefix and grid.
        prefix_latent_frames: As for `plan_windows`.
        grid: Of the model.

    Returns:
        The plan.
    """
    size, steps = options.causal_block_size, options.num_inference_steps
    windows = plan_windows(options, prefix_latent_frames, grid)
    matrices = tuple(
        step_matrix(window.frames // size, steps, options.ar_step, window.prefix // size)
        for window in windows
    )
    chunks = max(matrix.update.shape[1] for matrix in matrices)
    active = [
        np.pad(matrix.update, ((0, 0), (0, chunks - matrix.update.shape[1]))) for matrix in matrices
    ]
    starts = np.cumsum([0, *(len(rows) for rows in active[:-1])])
    height, width = grid.tokens(options.height, options.width)
    branches = 2 if options.guidance_scale > 1 else 1
    shape = RunShape(
        np.concatenate(active), tuple(starts.tolist()), branches, size, height * width, steps
    )
    return RunPlan(windows, matrices, shape, (height, width))
