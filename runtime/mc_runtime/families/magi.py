"""MAGI-1: its options, the plan of a run, and what a run computes once.

Neighbours: `magi_schedule` has timesteps, key ranges and guidance, `magi_steps` takes the steps;
`mc_runtime.generation` starts a run. The whole video is one window, whose keys are kept only as far
back as anything sees.

Source: SandAI-org/MAGI-1 6ff822e, inference/pipeline/video_generate.py.
"""

__all__ = [
    "MagiOptions",
    "count_continued",
    "default_options",
    "describe",
    "keep_on_device",
    "limit_video",
    "list_timesteps",
    "pick_prompts",
    "plan",
    "read_grid",
    "rehearse",
    "start",
]

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.building.bounds import Bounds, VideoLimits
from mc_engines.model_sizes import MAGI_DURATIONS
from mc_engines.run_sizes import Kept
from mc_runtime.families.family import Place, Rehearsal
from mc_runtime.families.magi_schedule import MagiOptions, MagiSchedule
from mc_runtime.families.magi_steps import MagiRun, MagiTexts
from mc_runtime.families.magi_work import describe_work
from mc_runtime.inputs import Inputs, NamedText, Prompt, pick_texts
from mc_runtime.option_values import check_values
from mc_runtime.passes import Passes, Values, View
from mc_runtime.run_plan import RunPlan
from mc_runtime.schedule import LatentGrid, Window, check_multiple, step_matrix
from motioncache import Policy, RunShape

_HIGH_QUALITY = 1  # row of the special tokens
_DURATION = 6  # row before that of a single chunk left
Embedding = NDArray[np.float32]


def default_options(config: Mapping[str, Any]) -> MagiOptions:
    """Take the defaults of a model; see `Family.defaults`."""
    schedule = config["schedule"]
    steps, fps = schedule["num_inference_steps"], schedule["fps"]
    return MagiOptions(**config["video"], num_inference_steps=steps, fps=fps)


def read_grid(config: Mapping[str, Any]) -> LatentGrid:
    """Read what latents and tokens stand for; every latent frame is of as many frames."""
    factor, patch = config["schedule"]["temporal_factor"], config["transformer"]["patch_size"]
    return LatentGrid(temporal_factor=factor, patch_size=tuple(patch), first_frames=factor)


def count_continued(frames: int, options: MagiOptions) -> int:
    """Count the frames of a given video that are continued; see `Family.continued`."""
    return min(frames, options.overlap_history)


def list_timesteps(options: MagiOptions, config: Mapping[str, Any]) -> NDArray[np.float32]:
    """List the time of every step, 0 to 1; see `Family.timesteps`."""
    return MagiSchedule.from_manifest(config, options).timesteps[:-1]


def pick_prompts(positive: Prompt, negative: Prompt, plan: RunPlan) -> Sequence[NamedText]:
    """Choose the prompt.

    Args:
        positive: Of the run.
        negative: None: these models are guided away from a caption of their own.
        plan: Of the run.

    Returns:
        The prompt.

    Raises:
        ValueError: There is a negative prompt.
    """
    if any(value is not None for value in negative):
        raise ValueError(
            "negative_prompt: expected none, as MAGI-1 is guided away from its own null caption, "
            "got one. Leave it out."
        )
    return pick_texts(positive, negative, 1)


def plan(options: MagiOptions, prefix: int, grid: LatentGrid, config: Mapping[str, Any]) -> RunPlan:
    """Lay out the steps of a run's chunks.

    Args:
        options: Of the run.
        prefix: Latent frames of a video that is continued.
        grid: Of the model.
        config: Of the manifest.

    Returns:
        The plan, of one window.

    Raises:
        ValueError: A setting that cannot be generated; the message names the nearest that can.
    """
    check_values(options)
    schedule = MagiSchedule.from_manifest(config, options)
    stages, reason = schedule.window_chunks, ", the chunks of a window"
    check_multiple("num_inference_steps", options.num_inference_steps, stages, reason)
    chunk = grid.pixel_frames(schedule.chunk_frames)
    check_multiple("num_frames", options.num_frames, chunk)
    check_multiple("overlap_history", options.overlap_history, grid.temporal_factor)
    for side in ("height", "width"):
        unit = grid.spatial_factor * grid.patch_size[1 if side == "height" else 2]
        check_multiple(side, getattr(options, side), unit)
    size, frames = schedule.chunk_frames, grid.latent_frames(options.num_frames)
    if prefix >= frames:
        raise ValueError(
            f"video to continue: expected fewer frames than num_frames ({options.num_frames}), "
            f"which counts them too, got {grid.pixel_frames(prefix)}. Cut it or raise num_frames."
        )
    steps = options.num_inference_steps
    matrix = step_matrix(frames // size, steps, schedule.stage_steps, prefix // size)
    height, width = grid.tokens(options.height, options.width)
    branches = len(schedule.branches)
    shape = RunShape(matrix.update, (0,), branches, size, height * width, steps)
    return RunPlan((Window(0, frames, prefix, 0),), (matrix,), shape, (height, width))


def describe(
    config: Mapping[str, Any], options: MagiOptions, plan: RunPlan, tokens: Sequence[int]
) -> dict[str, Any]:
    """Say what the passes of a run see, and which texts are encoded; see `Family.describe`."""
    schedule = MagiSchedule.from_manifest(config, options)
    prompt, null, special = tokens
    length = min(prompt + 2 * bool(special), schedule.max_text_tokens)
    return describe_work(schedule, plan, [length] * _count_captions(plan, special), null)


def limit_video(options: MagiOptions, config: Mapping[str, Any]) -> VideoLimits:
    """Return a video of as many frames as a branch keeps keys of at once; see `Family.limits`."""
    schedule, grid = MagiSchedule.from_manifest(config, options), read_grid(config)
    chunk = grid.pixel_frames(schedule.chunk_frames)
    chunks = options.num_frames // chunk
    kept = schedule.kept_chunks(chunks, given=chunks)  # whether anything is given is not known
    return VideoLimits(options.height, options.width, kept * chunk, schedule.chunk_frames)


def keep_on_device(config: Mapping[str, Any], symbols: Mapping[str, Bounds]) -> Kept:
    """Say what a run keeps on a GPU; see `Family.kept`. Velocities stay on the host."""
    schedule = MagiSchedule.from_manifest(config, default_options(config))
    tokens, slots, text = (symbols[name].most for name in ("L", "S", "T"))
    alone = min(slots, schedule.window_chunks * tokens)
    keys = tuple(alone if branch.alone else slots for branch in schedule.branches)
    return Kept(keys, (MAGI_DURATIONS + 1) * text, 0)


def start(inputs: Inputs, plan: RunPlan, passes: Passes, policy: Policy) -> MagiRun:
    """Compute the keys of the texts and the modulation, once.

    Args:
        inputs: Tensors and settings; embeddings of the prompt, of the null caption and of the
            special tokens.
        plan: Of the run.
        passes: Of the transformer.
        policy: Has accepted the shape of the run.

    Returns:
        The run.
    """
    schedule = MagiSchedule.from_manifest(inputs.config, inputs.options)
    prompt, null, special = inputs.embeddings
    by_duration = [
        passes.encode_context(_caption(prompt, special, left, schedule.max_text_tokens))
        for left in range(1, _count_captions(plan, special.shape[1]) + 1)
    ]
    return MagiRun(
        passes,
        policy,
        schedule,
        MagiTexts(passes.encode_context(null), by_duration),
        [_modulate(passes, schedule, null_row) for null_row in (0, 1)],
        plan.shape.active.shape[1],
    )


def rehearse(
    passes: Passes, options: MagiOptions, plan: RunPlan, config: Mapping[str, Any]
) -> Rehearsal:
    """Give the passes of a full window, each chunk in its stage; see `Family.rehearse`."""
    schedule = MagiSchedule.from_manifest(config, options)
    modulation = _modulate(passes, schedule, null_row=1)[:1]

    def make(branch: Any, place: Place, x: Values, rows: NDArray[np.intp]) -> None:
        passes.to_host(x)  # where a step measures how far its latents have moved
        if len(rows):
            view = View(place.seen)
            out = passes.recompute(branch, place.chunk, x, rows, modulation, view)
            passes.read(out, np.zeros((1, 0), np.float32))

    return Rehearsal(_list_places(schedule, plan), make)


def _list_places(schedule: MagiSchedule, plan: RunPlan) -> list[Place]:
    """Chunks of the last row in which most are active, and one that sees itself alone."""
    active = plan.shape.active
    counts, chunks = active.sum(axis=1), active.shape[1]
    row = int(np.flatnonzero(counts == counts.max())[-1])
    steps, slots = plan.matrices[0].step[row] - 1, schedule.slots(chunks, 0)
    places = []
    for chunk in np.flatnonzero(active[row]).tolist():
        step = int(steps[chunk])
        name = f"chunk {chunk + 1}, stage {step // schedule.stage_steps + 1}"
        places.append(Place(name, chunk, schedule.visible(chunk, step), slots[0]))
    if schedule.branches[-1].alone:
        last = places[-1].chunk
        places.append(Place(f"chunk {last + 1}, itself alone", last, [last], slots[-1]))
    return places


def _count_captions(plan: RunPlan, special: int) -> int:
    """How many captions a prompt becomes: one for every number of chunks left that a token says."""
    left = int(plan.shape.active.any(axis=0).sum())  # those of a prefix have the null caption
    return min(left, MAGI_DURATIONS) if special else 1


def _caption(prompt: Embedding, special: Embedding, left: int, most: int) -> Embedding:
    """The prompt behind the tokens that ask for quality and say how many chunks are left."""
    numbers = [_DURATION + left, _HIGH_QUALITY] if special.shape[1] else []
    return np.concatenate([special[:, numbers], prompt], axis=1)[:, :most]


def _modulate(passes: Passes, schedule: MagiSchedule, null_row: int) -> NDArray[np.float32]:
    """What the blocks are told of each step, and of the clean pass, with a row of the caption."""
    timesteps = np.append(schedule.timesteps[:-1], np.float32(schedule.clean_timestep))
    inputs = {"timesteps": timesteps, "null_row": np.full(len(timesteps), null_row)}
    if schedule.distilled:
        told = schedule.told_lengths
        inputs["distill"] = np.append(told, told[0])  # the clean pass begins a stage
    modulation: NDArray[np.float32] = passes.timestep.run(inputs)["modulation"]
    return modulation
