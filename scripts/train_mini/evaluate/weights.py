"""How well motion weights find what moves: the area under the ROC curve, token by token.

A token moves if anything in its 8 x 8 pixels moves in any of its latent frame's video frames. The
area is taken over the tokens of one chunk in one pass, where some move and some do not, and
averaged over passes after the warm-up, then over clips.
"""

__all__ = [
    "WARMUP_STEPS",
    "find_changes",
    "force_weights",
    "rank_tokens",
    "score_trace",
    "to_tokens",
    "watch",
    "watch_scene",
]

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from scripts.train_mini.forcing import CHUNK
from scripts.train_mini.world import SIZE, Scene

from mc_runtime import VideoPipeline
from mc_runtime.fidelity import MOVING_LEVELS
from mc_runtime.latent_motion import measure_latent_motion
from mc_runtime.patches import patchify, unpatchify
from mc_runtime.sampler import sampler_table
from mc_runtime.transformer import KeyCache
from motioncache import DecisionTrace, Plan, Policy
from motioncache.motion import MotionCacheConfig, motion_weights

WARMUP_STEPS = MotionCacheConfig.warmup_steps
_EVERY = 4  # rows of the schedule: neighbours say nearly the same

Mask = NDArray[np.bool_]


def watch() -> Policy:
    """Return the policy `none`, with the motion weights of every step in its trace."""
    return Policy(
        "none",
        init_state=lambda shape, scope: (shape.tokens, None),
        plan_step=lambda state, distance: (Plan.full(state[0], wants_motion=True), state),
        observe=lambda state, motion: (state[0], motion_weights(motion, 0.0).reshape(-1)),
        weights=lambda state: state[1],
        motion="latents",
    )


def to_tokens(moving: Mask) -> Mask:
    """Return which tokens move: pixels (T, 64, 64) become (latent frames, 64 positions)."""
    later = moving[1:].reshape(-1, 4, *moving.shape[1:]).any(axis=1)
    frames = np.concatenate([moving[:1], later])
    cells = frames.reshape(len(frames), SIZE // 8, 8, SIZE // 8, 8).any(axis=(2, 4))
    return cells.reshape(len(frames), -1)


def find_changes(frames: NDArray[np.uint8]) -> Mask:
    """Return the pixels that change by more than 8 levels; the first frame takes the second's.

    Without the margin of `mc_runtime.fidelity.find_moving_pixels`: what does not change is still.
    """
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).max(axis=-1) > MOVING_LEVELS
    return np.concatenate([change[:1], change])


def rank_tokens(weights: NDArray[np.floating], moves: Mask) -> float | None:
    """Return the area under the ROC curve, None where all tokens move or none does."""
    if moves.all() or not moves.any():
        return None
    wins = mannwhitneyu(weights[moves], weights[~moves]).statistic
    return float(wins / (moves.sum() * (~moves).sum()))


def watch_scene(
    pipeline: VideoPipeline, seed: int, scene: Scene
) -> tuple[NDArray[np.uint8], float | None]:
    """Generate the video of a caption uncached; return its frames and the area of its weights."""
    video = pipeline.run(scene.caption(), policy=watch(), seed=seed)
    assert video.frames is not None  # the bundle has a VAE
    return video.frames, score_trace(video.trace, video.frames)


def score_trace(trace: DecisionTrace, frames: NDArray[np.uint8]) -> float | None:
    """Return the mean area of a watched run, on what moves in the video that it gave.

    Args:
        trace: Of a run with `watch`, one window; the weights of the prompt's branch count.
        frames: shape (T, 64, 64, 3), uint8.
    """
    moves = to_tokens(find_changes(frames)).reshape(trace.step.shape[1], -1)
    areas = [
        rank_tokens(trace.weights[row, 0, chunk].astype(np.float32), moves[chunk])
        for row, chunk in np.argwhere(trace.step > WARMUP_STEPS + 1)
    ]
    return _mean(areas)


def force_weights(
    pipeline: VideoPipeline, latents: NDArray[np.float32], caption: str, moving: Mask, seed: int
) -> dict[str, float | None]:
    """Rank the weights of a given clip, noised to what each row of the schedule expects.

    Args:
        pipeline: Of the model.
        latents: Of the clip, shape (16, 25, 16, 16), normalised.
        caption: Its prompt.
        moving: What truly moves, shape (97, 64, 64).
        seed: Of the noise.

    Returns:
        The mean area, of the motion of the predicted clean latents (`area`) and of the published
        motion of the block output (`output_area`).
    """
    moves = to_tokens(moving).reshape(latents.shape[1] // CHUNK, -1)
    areas: dict[str, list[float | None]] = {"area": [], "output_area": []}
    for chunk, motions in _forced_passes(pipeline, latents, caption, seed):
        for name, motion in zip(areas, motions, strict=True):
            weights = motion_weights(motion, 0.0).reshape(-1)
            areas[name].append(rank_tokens(weights, moves[chunk]))
    return {name: _mean(each) for name, each in areas.items()}


def _forced_passes(
    pipeline: VideoPipeline, latents: NDArray[np.float32], caption: str, seed: int
) -> Iterator[tuple[int, tuple[NDArray[np.float32], NDArray[np.float32]]]]:
    """Chunk and motion of passes after the warm-up over a clip that is noised, not generated.

    The motion is that of the predicted clean latents and that of the block output, both without
    guidance. The first frame of a chunk is compared with the chunk before as that is in this row:
    once finished, at timestep 0 (a run keeps what its last step gave).
    """
    transformer, options = pipeline.transformer, pipeline.default_options
    plan = pipeline.plan(options)
    config, matrix, tokens = transformer.config, plan.matrices[0], plan.shape.tokens
    table = sampler_table(
        options.num_inference_steps, options.flow_shift, options.sigma_table, options.first_sample
    )
    conditions = transformer.encode_timesteps(np.append(table.timesteps, 0), options.fps)
    context = transformer.encode_context(pipeline.embed_text("prompt", caption, print))
    noise = np.random.default_rng(seed).standard_normal(latents.shape, np.float32)
    for steps, updates in zip(matrix.step[::_EVERY], matrix.update[::_EVERY], strict=True):
        cache = KeyCache(config, tokens * len(steps))
        last: list[NDArray[np.float32] | None] = [None, None]
        for chunk in range(int((steps > 0).sum())):
            frames, step = slice(chunk * CHUNK, (chunk + 1) * CHUNK), int(steps[chunk]) - 1
            sigma = table.sigmas[step]
            x = (1 - sigma) * latents[:, frames] + sigma * noise[:, frames]
            angles = config.rope.tables(CHUNK, *plan.token_grid, first_frame=frames.start)
            out = transformer.recompute(
                transformer.embed(patchify(x, config.patch_size)),
                np.arange(tokens),
                conditions.modulation[step : step + 1],
                angles,
                context,
                cache,
                chunk * tokens,
            )
            velocity = transformer.head(out, conditions.head_modulation[step : step + 1])
            clean = x - sigma * unpatchify(velocity, config.patch_size, x.shape)
            rows = patchify(clean, config.patch_size).reshape(CHUNK, tokens // CHUNK, -1)
            motions = (
                measure_latent_motion(rows, last[0]),
                transformer.motion(out, CHUNK, last[1]),
            )
            last = [rows[-1], out[:, -(tokens // CHUNK) :]]
            if updates[chunk] and step > WARMUP_STEPS:
                yield chunk, motions


def _mean(areas: list[float | None]) -> float | None:
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else None
