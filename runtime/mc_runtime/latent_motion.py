"""How clean latents move from frame to frame: what MotionCache weights tokens by.

Neighbours: `denoise` measures it after a step and shows it to the policy; the published rule takes
`Transformer.motion` of the block output instead.
"""

__all__ = ["measure_latent_motion"]

import numpy as np
from numpy.typing import NDArray


def measure_latent_motion(
    latents: NDArray[np.float32], previous: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Measure how much each frame of a chunk differs from the one before.

    Args:
        latents: Tokens of a chunk's latents, shape (F, P, c).
        previous: Last frame of the chunk before, shape (P, c); without it the first frame takes
            the motion of the second.

    Returns:
        Mean absolute difference over c, shape (F, P); zeros for a single frame without a previous.

    Example:
        >>> frames = np.array([[[0.0]], [[3.0]], [[1.0]]], np.float32)
        >>> measure_latent_motion(frames, None).ravel().tolist()
        [3.0, 3.0, 2.0]
    """
    before = latents[:1] if previous is None else previous[None]
    motion: NDArray[np.float32] = np.abs(np.diff(latents, axis=0, prepend=before)).mean(axis=2)
    if previous is None:
        motion[0] = motion[min(1, len(motion) - 1)]
    return motion
