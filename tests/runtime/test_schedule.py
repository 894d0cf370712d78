"""Step matrix, windows and refusals, against diffusers' own functions and whole pipelines.

The pipelines run with a transformer that answers velocity zero, for which UniPC leaves latents as
they are: their output then shows from which noise, or from which given frame, each frame came.
"""

import contextlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.pipelines.skyreels_v2 import (
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    pipeline_skyreels_v2_diffusion_forcing,
    pipeline_skyreels_v2_diffusion_forcing_v2v,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mc_runtime.options import GenerationOptions
from mc_runtime.sampler import sigma_table
from mc_runtime.schedule import (
    LatentGrid,
    check_frames,
    plan_windows,
    step_matrix,
    validate_options,
)

STEPS = 3


class StillTransformer(torch.nn.Module):
    """Answers velocity zero and keeps the timesteps it was given."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(in_channels=1, num_frame_per_block=1)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.timesteps = []

    def _set_ar_attention(self, causal_block_size):
        pass

    def cache_context(self, name):
        return contextlib.nullcontext()

    def forward(self, hidden_states, timestep, **unused):
        self.timesteps.append(timestep[0].tolist())
        return (torch.zeros_like(hidden_states),)


class CountingVae(torch.nn.Module):
    """Encodes a video into latent frames -1, -2, ...; has what the pipeline asks of a VAE."""

    def __init__(self):
        super().__init__()
        self.temperal_downsample = [False, True, True]
        self.config = SimpleNamespace(z_dim=1, latents_mean=[0.0], latents_std=[1.0])
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def encode(self, video):
        frames = LatentGrid().latent_frames(video.shape[2])
        latents = -1.0 - torch.arange(frames, dtype=torch.float32)
        return SimpleNamespace(latents=latents.view(1, 1, -1, 1, 1).expand(1, 1, -1, 2, 2))


def label_noise(shape, **unused):
    """Noise of window 0 is 0, 1, 2, ...; that of window 1 is 1000, 1001, ...; and so on."""
    label_noise.windows += 1
    labels = 1000.0 * (label_noise.windows - 1) + torch.arange(shape[2], dtype=torch.float32)
    return labels.view(1, 1, -1, 1, 1).expand(shape).clone()


def run_pipeline(options, monkeypatch, video=None):
    """Return each frame's label in diffusers' output and the timesteps of every row."""
    label_noise.windows = 0
    transformer, vae = StillTransformer(), None if video is None else CountingVae()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    if video is None:
        module, kind = pipeline_skyreels_v2_diffusion_forcing, SkyReelsV2DiffusionForcingPipeline
    else:
        module = pipeline_skyreels_v2_diffusion_forcing_v2v
        kind = SkyReelsV2DiffusionForcingVideoToVideoPipeline
    monkeypatch.setattr(module, "randn_tensor", label_noise)
    pipeline = kind(None, None, transformer, vae, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        prompt=None,
        prompt_embeds=torch.zeros(1, 1, 1),
        guidance_scale=1.0,
        num_frames=options.num_frames,
        height=16,
        width=16,
        num_inference_steps=STEPS,
        ar_step=options.ar_step,
        causal_block_size=options.causal_block_size,
        base_num_frames=options.base_num_frames,
        overlap_history=options.overlap_history,
        addnoise_condition=0,
        output_type="latent",
        return_dict=False,
        **({} if video is None else {"video": video}),
    )[0]
    return latents[0, 0, :, 0, 0].round().tolist(), transformer.timesteps


def follow_plan(options, prefix_latent_frames=0):
    """What the windows say `run_pipeline` finds."""
    video = [-1.0 - frame for frame in range(prefix_latent_frames)]
    windows = plan_windows(options, prefix_latent_frames)
    timesteps = np.array([999, *still_timesteps(), 0])
    rows = []
    for index, window in enumerate(windows):
        fresh = [1000.0 * index + frame for frame in range(window.frames)]
        prefix = video[window.first : window.first + window.prefix]
        assert len(prefix) == window.prefix
        made = prefix + fresh[window.prefix :]
        video = video[: window.first + window.skip] + made[window.skip :]
        size = options.causal_block_size
        chunks, ready = window.frames // size, window.prefix // size
        steps = step_matrix(chunks, STEPS, options.ar_step, ready).step
        rows += timesteps[np.repeat(steps, size, axis=1)].tolist()
    return video, rows


def still_timesteps():
    return sigma_table(STEPS, 1.0, "diffusers")[1]


@st.composite
def draw_options(draw):
    """Options that can be generated, of one to four windows."""
    chunk = draw(st.integers(1, 5))
    base = chunk * draw(st.integers(2, 5))
    overlap = draw(st.integers(chunk, base - 1))
    earlier = draw(st.integers(0, 3))
    last = chunk * draw(st.integers(overlap // chunk + 1 if earlier else 1, base // chunk))
    total = earlier * (base - overlap) + last
    return GenerationOptions(
        num_frames=4 * total - 3,
        base_num_frames=4 * base - 3,
        overlap_history=4 * overlap - 3,
        causal_block_size=chunk,
        ar_step=draw(st.integers(0, 5)),
    )


@given(
    chunks=st.integers(1, 8),
    steps=st.integers(1, 60),
    ar_step=st.integers(0, 70),
    ready=st.integers(0, 7),
    size=st.integers(1, 6),
)
def test_step_matrix_equals_diffusers(chunks, steps, ar_step, ready, size):
    assume(ready < chunks)
    template = torch.arange(steps, 0, -1)
    _, index, update, interval = SkyReelsV2DiffusionForcingPipeline.generate_timestep_matrix(
        None, chunks * size, template, chunks * size, ar_step, ready * size, size
    )
    matrix = step_matrix(chunks, steps, ar_step, ready)
    np.testing.assert_array_equal(matrix.step.repeat(size, axis=1), index.numpy())
    np.testing.assert_array_equal(matrix.update.repeat(size, axis=1), update.numpy())
    assert set(interval) == {(0, chunks * size)}


def test_a_window_without_work_has_no_rows():
    assert step_matrix(3, steps=5, ar_step=2, ready_chunks=3).step.shape == (0, 3)


@pytest.mark.parametrize(("ready", "rows"), [(0, 70), (1, 65)])
def test_rows_of_the_published_setting(ready, rows):
    matrix = step_matrix(5, steps=50, ar_step=5, ready_chunks=ready)
    assert matrix.step.shape == (rows, 5)
    assert matrix.update.sum() == 50 * (5 - ready)


@settings(deadline=None, max_examples=40)
@given(options=draw_options())
def test_windows_equal_those_of_diffusers(options):
    validate_options(options)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run_pipeline(options, monkeypatch) == follow_plan(options)


@settings(deadline=None, max_examples=40)
@given(options=draw_options())
def test_windows_of_a_continuation_equal_those_of_diffusers(options):
    prefix = LatentGrid().latent_frames(options.overlap_history)
    assume(LatentGrid().latent_frames(options.num_frames) > prefix)
    validate_options(options, prefix)
    video = torch.zeros(options.overlap_history + 3, 3, 16, 16)
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = run_pipeline(options, monkeypatch, video)
    assert found == follow_plan(options, prefix)


@given(
    options=draw_options(),
    frames=st.integers(1, 260),
    continued=st.booleans(),
)
def test_frames_that_fit_pass_and_the_others_name_the_nearest_that_do(options, frames, continued):
    size, grid = options.causal_block_size, LatentGrid()
    prefix = grid.latent_frames(options.overlap_history) if continued else 0

    def refuse(count):
        asked = GenerationOptions(**{**vars(options), "num_frames": count})
        windows = plan_windows(asked, prefix)
        fits = count % 4 == 1 and all(w.frames % size == 0 for w in windows)
        fits = fits and all(w.frames > w.prefix for w in windows)
        try:
            check_frames(asked, prefix)
        except ValueError as error:
            assert not fits
            return [int(number) for number in re.findall(r"\d+", str(error).split("Use")[1])]
        assert fits
        return []

    named = refuse(frames)
    if named:
        *below, above = named
        assert above > frames and not refuse(above)
        assert all(refuse(count) for count in range(frames + 1, above))
        assert all(refuse(count) for count in range(below[0] + 1 if below else 1, frames))
        assert all(count < frames and not refuse(count) for count in below)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_frames": 100}, "whole chunks of 5 latent frames, got 100. Use 97 or 117."),
        ({"num_frames": 99}, "whole chunks of 5 latent frames, got 99. Use 97 or 117."),
        ({"num_frames": 121}, "whole chunks of 5 latent frames, got 121. Use 117 or 137."),
        ({"num_frames": 1}, "whole chunks of 5 latent frames, got 1. Use 17."),
    ],
)
def test_frames_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError) as error:
        validate_options(GenerationOptions(**changed))
    assert str(error.value) == f"num_frames: expected a count that fills {message}"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_frames": 0}, "num_frames: expected a whole number, got 0. Use 1 or more."),
        ({"fps": 23.976}, "fps: expected a whole number, got 23.976. Use 1 or more."),
        ({"seed": -1}, "seed: expected a whole number, got -1. Use 0 or more."),
        ({"ar_step": -1}, "ar_step: expected a whole number, got -1. Use 0 or more."),
        (
            {"num_inference_steps": 0},
            "num_inference_steps: expected a whole number, got 0. Use 1 to 1000.",
        ),
        (
            {"addnoise_condition": 1000},
            "addnoise_condition: expected a whole number, got 1000. Use 0 to 999.",
        ),
        (
            {"guidance_scale": float("nan")},
            "guidance_scale: expected a finite number, got nan. Use one above 0.",
        ),
        ({"flow_shift": 0}, "flow_shift: expected a finite number, got 0. Use one above 0."),
        (
            {"sigma_table": "karras"},
            "sigma_table: expected diffusers or skyreels, got 'karras'. Use one of these.",
        ),
        (
            {"first_sample": "moved"},
            "first_sample: expected aliased or copied, got 'moved'. Use one of these.",
        ),
        ({"height": 545}, "height: expected a multiple of 16, got 545. Use 544 or 560."),
        ({"width": 8}, "width: expected a multiple of 16, got 8. Use 16."),
        (
            {"num_inference_steps": 150},
            "num_inference_steps: expected at most 125 with flow_shift 8, or the first two "
            "timesteps are equal, got 150. Use fewer steps or a lower flow_shift.",
        ),
        (
            {"base_num_frames": 121},
            "base_num_frames: expected a count that fills two or more whole chunks of 5 latent "
            "frames, got 121. Use 117 or 137.",
        ),
        (
            {"base_num_frames": 17},
            "base_num_frames: expected a count that fills two or more whole chunks of 5 latent "
            "frames, got 17. Use 37.",
        ),
        (
            {"overlap_history": 18},
            "overlap_history: expected 4k + 1 frames from one chunk (17) to below base_num_frames "
            "(93), got 18. Use 17.",
        ),
        (
            {"overlap_history": 13},
            "overlap_history: expected 4k + 1 frames from one chunk (17) to below base_num_frames "
            "(93), got 13. Use 17.",
        ),
        (
            {"overlap_history": 97},
            "overlap_history: expected 4k + 1 frames from one chunk (17) to below base_num_frames "
            "(93), got 97. Use 93.",
        ),
    ],
)
def test_a_setting_that_cannot_be_generated_is_refused(changed, message):
    with pytest.raises(ValueError) as error:
        validate_options(GenerationOptions(**changed))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("frames", "prefix", "message"),
    [
        (
            97,
            1,
            "video to continue: expected at least 17 frames, a chunk of 5 latent frames, "
            "got 1 latent frames. Pass a longer video.",
        ),
        (
            17,
            5,
            "num_frames: expected a count that fills whole chunks of 5 latent frames beyond the "
            "5 given, got 17. Use 37.",
        ),
    ],
)
def test_a_continuation_that_adds_nothing_is_refused(frames, prefix, message):
    with pytest.raises(ValueError) as error:
        validate_options(GenerationOptions(num_frames=frames), prefix)
    assert str(error.value) == message


@pytest.mark.parametrize("changed", [{}, {"num_frames": 177}, {"ar_step": 0}, {"ar_step": 80}])
def test_settings_that_work_are_accepted(changed):
    validate_options(GenerationOptions(**changed))


@settings(max_examples=30)
@given(shift=st.floats(0.5, 20.0), steps=st.integers(1, 200))
def test_the_step_limit_is_where_diffusers_fails(shift, steps):
    options = GenerationOptions(num_inference_steps=steps, flow_shift=shift)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    if scheduler.index_for_timestep(scheduler.timesteps[0]) == 0:
        validate_options(options)
    else:
        with pytest.raises(ValueError, match="expected at most"):
            validate_options(options)
