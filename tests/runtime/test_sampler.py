"""Sigma tables and UniPC against diffusers' scheduler, fed by its pipeline's views or by copies."""

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mc_runtime.sampler import init_sampler, sampler_step, sampler_table, sigma_table

KINDS = ("diffusers", "skyreels")
FIRST_SAMPLES = ("copied", "aliased")
# Of SkyReels-V2 abed76f, fm_solvers_unipc.py, with 50 steps and shift 8.
PUBLISHED_SKYREELS = (
    "999 997 994 991 989 986 983 979 976 973 969 965 961 957 953 948 944 939 934 928 922 916 910 "
    "903 896 888 880 871 862 852 841 830 817 804 789 773 756 737 716 692 666 636 603 565 521 470 "
    "409 337 249 140"
)


def make_scheduler(steps, shift, kind):
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    if kind == "skyreels":
        sigmas, timesteps = sigma_table(steps, shift, kind)
        scheduler.sigmas = torch.from_numpy(sigmas)
        scheduler.timesteps = torch.from_numpy(timesteps)
    return scheduler


def draw(steps, dtype=np.float32):
    """Noise and velocities of two latent frames: (1, C, F, h, w), (N, 1, C, F, h, w)."""
    values = np.random.default_rng(steps).standard_normal((steps + 1, 1, 4, 2, 4, 4))
    return values[0].astype(dtype), values[1:].astype(dtype)


def run_diffusers(steps, shift, kind, first_sample, dtype=np.float32):
    """The pipeline's loop: one scheduler per frame, each given a view that is then overwritten."""
    noise, velocities = draw(steps, dtype)
    latents = torch.from_numpy(noise.copy())
    schedulers = [make_scheduler(steps, shift, kind) for _ in range(latents.shape[2])]
    for scheduler in schedulers:
        scheduler.sigmas = scheduler.sigmas.to(latents.dtype)
    for velocity in torch.from_numpy(velocities):
        for frame, scheduler in enumerate(schedulers):
            index = scheduler.step_index or 0
            sample = latents[:, :, frame]
            latents[:, :, frame] = scheduler.step(
                velocity[:, :, frame],
                scheduler.timesteps[index],
                sample if first_sample == "aliased" else sample.clone(),
                return_dict=False,
            )[0]
    return latents.numpy()


def run_ours(steps, shift, kind, first_sample, dtype=np.float32):
    latents, velocities = draw(steps, dtype)
    table = sampler_table(steps, shift, kind, first_sample)
    state = init_sampler()
    for velocity in velocities:
        latents, state = sampler_step(table, state, velocity, latents)
    return latents


def fits_diffusers(steps, shift, kind):
    """Diffusers loses count when the first two timesteps are equal."""
    timesteps = sigma_table(steps, shift, kind)[1]
    return steps == 1 or timesteps[0] != timesteps[1]


@given(steps=st.integers(1, 200), shift=st.floats(0.2, 20.0))
def test_sigmas_and_timesteps_are_exactly_those_of_diffusers(steps, shift):
    scheduler = make_scheduler(steps, shift, "diffusers")
    sigmas, timesteps = sigma_table(steps, shift, "diffusers")
    assert (sigmas.dtype, timesteps.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(sigmas, scheduler.sigmas.numpy())
    np.testing.assert_array_equal(timesteps, scheduler.timesteps.numpy())


def test_timesteps_of_skyreels_are_the_published_ones():
    sigmas, timesteps = sigma_table(50, 8.0, "skyreels")
    assert " ".join(map(str, timesteps)) == PUBLISHED_SKYREELS
    assert not sigmas[-1]


@pytest.mark.parametrize("first_sample", FIRST_SAMPLES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [50, 20, 16, 12, 5, 3, 2, 1])
def test_latents_equal_diffusers(steps, kind, first_sample):
    expected = run_diffusers(steps, 8.0, kind, first_sample)
    latents = run_ours(steps, 8.0, kind, first_sample)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    steps=st.integers(1, 60),
    shift=st.floats(1.0, 17.0),
    kind=st.sampled_from(KINDS),
    first_sample=st.sampled_from(FIRST_SAMPLES),
)
def test_coefficients_equal_diffusers_in_float64(steps, shift, kind, first_sample):
    assume(fits_diffusers(steps, shift, kind))
    expected = run_diffusers(steps, shift, kind, first_sample, np.float64)
    latents = run_ours(steps, shift, kind, first_sample, np.float64)
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_first_samples_differ(kind):
    copied, aliased = (run_ours(16, 8.0, kind, first) for first in FIRST_SAMPLES)
    assert np.abs(copied - aliased).max() > 1e-3


@pytest.mark.parametrize("first_sample", FIRST_SAMPLES)
@given(steps=st.integers(1, 50), shift=st.floats(1.0, 17.0), kind=st.sampled_from(KINDS))
def test_a_velocity_that_points_at_one_place_arrives_there(first_sample, steps, shift, kind):
    noise, target = draw(1)
    table = sampler_table(steps, shift, kind, first_sample)
    state, latents = init_sampler(), noise.astype(np.float64)
    for sigma in table.sigmas[:-1].astype(np.float64):
        latents, state = sampler_step(table, state, (latents - target[0]) / sigma, latents)
    np.testing.assert_allclose(latents, target[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("first_sample", FIRST_SAMPLES)
def test_what_the_caller_does_to_its_arrays_changes_nothing(first_sample):
    noise, velocities = draw(5)
    table = sampler_table(5, 8.0, "diffusers", first_sample)
    state, buffer = init_sampler(), noise.copy()
    for velocity in velocities:
        passed = velocity.copy()
        latents, state = sampler_step(table, state, passed, buffer)
        buffer[...] = latents
        latents[...] = passed[...] = np.nan
    np.testing.assert_array_equal(buffer, run_ours(5, 8.0, "diffusers", first_sample))


def test_a_step_too_many_is_refused():
    noise, velocities = draw(1)
    table = sampler_table(1, 8.0, "diffusers", "copied")
    latents, state = sampler_step(table, init_sampler(), velocities[0], noise)
    with pytest.raises(ValueError) as error:
        sampler_step(table, state, velocities[0], latents)
    assert str(error.value) == (
        "sampler: expected at most 1 steps of a chunk, got one more. "
        "Start the next chunk with init_sampler()."
    )


def test_a_velocity_of_another_shape_is_refused():
    table = sampler_table(2, 8.0, "diffusers", "copied")
    with pytest.raises(ValueError) as error:
        sampler_step(table, init_sampler(), np.zeros((1, 4), np.float32), np.zeros(4, np.float32))
    assert str(error.value) == (
        "velocity: expected shape (4,), got (1, 4). Pass the velocity of the same chunk."
    )
