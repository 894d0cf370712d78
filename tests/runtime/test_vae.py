"""Driving the autoencoder's steps: counts, sizes, states, normalisation and rounding."""

import itertools
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mc_engines.function_runner import FunctionRunner
from mc_engines.runner import Array
from mc_engines.specs import GraphSpec, TensorSpec
from mc_export.random_source import RandomSource
from mc_export.wan_vae_components import describe_vae, vae_components, vae_tensors
from mc_runtime.vae import VaeConfig, VaeDecoder, VaeEncoder, to_uint8

TOLERANCE = 1e-4
MODEL = dict(
    base_dim=8,
    z_dim=4,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    latents_mean=[0.1, -0.2, 0.3, 0.0],
    latents_std=[1.5, 0.5, 2.0, 1.0],
)
RNG = np.random.default_rng(0)
LATENTS = RNG.standard_normal((4, 7, 2, 3), np.float32)
VIDEO = RNG.integers(0, 256, (25, 8, 12, 3), np.uint8)


def runner_of(component, dtype="float32"):
    """A component as an engine that takes and gives `dtype`."""

    def function(inputs, weights):
        tensors = {name: torch.from_numpy(x).float() for name, x in inputs.items()}
        with torch.no_grad():
            outputs = component.module(**tensors)
        names = [spec.name for spec in graph.outputs]
        return {name: x.numpy().astype(dtype) for name, x in zip(names, outputs, strict=True)}

    with torch.no_grad():
        results = component.module(**component.inputs)
    given = dict(zip(component.outputs, results, strict=True))
    graph = GraphSpec(component.name, specs(component.inputs, dtype), specs(given, dtype))
    return FunctionRunner(graph, function)


def specs(tensors, dtype):
    """Tensor specs whose sizes are multiples of the traced latent frame's, 4 by 6."""
    return tuple(
        TensorSpec(name, dtype, (*x.shape[:3], f"{x.shape[3] // 4}*h", f"{x.shape[4] // 6}*w"))
        for name, x in tensors.items()
    )


@pytest.fixture(scope="module")
def components():
    source = RandomSource(vae_tensors(MODEL), torch.float32, seed=0)
    return {component.name: component for component in vae_components(MODEL, source)}


@pytest.fixture(scope="module")
def vae(components):
    first_encoder, encoder, first_decoder, decoder = map(runner_of, components.values())
    config = VaeConfig(**describe_vae(MODEL))
    return VaeEncoder(first_encoder, encoder, config), VaeDecoder(first_decoder, decoder, config)


@pytest.fixture(scope="module")
def oracle():
    source = RandomSource(vae_tensors(MODEL), torch.float32, seed=0)
    model = AutoencoderKLWan(**MODEL).eval()
    model.load_state_dict({name: source.load(name) for name in source.names()})
    return model


def statistics(model):
    """Mean and reciprocal deviation as diffusers' pipelines make them."""
    shape = (1, model.config.z_dim, 1, 1, 1)
    return (
        torch.tensor(model.config.latents_mean).view(shape),
        1.0 / torch.tensor(model.config.latents_std).view(shape),
    )


@torch.no_grad()
def test_decode_equals_diffusers(vae, oracle):
    mean, inverse_std = statistics(oracle)
    video = oracle.decode(torch.from_numpy(LATENTS)[None] / inverse_std + mean).sample
    expected = video[0].permute(1, 2, 3, 0).numpy()
    frames, _ = vae[1].decode(LATENTS)
    assert frames.dtype == np.float32 and frames.flags["C_CONTIGUOUS"]
    assert frames.shape == (25, 8, 12, 3)
    assert np.abs(frames - expected).max() <= TOLERANCE


@torch.no_grad()
def test_encode_equals_diffusers(vae, oracle):
    mean, inverse_std = statistics(oracle)
    video = VideoProcessor(vae_scale_factor=4).preprocess_video(VIDEO.astype(np.float32) / 255)
    expected = (oracle.encode(video).latent_dist.mode() - mean) * inverse_std
    latents = vae[0].encode(VIDEO)
    assert latents.dtype == np.float32 and latents.shape == (4, 7, 2, 3)
    assert np.abs(latents - expected[0].numpy()).max() <= TOLERANCE


@pytest.mark.parametrize("cuts", [(0, 7), (0, 1, 7), (0, 5, 7), range(8)])
def test_chunks_continue_where_the_one_before_ended(vae, cuts):
    whole, _ = vae[1].decode(LATENTS)
    state, parts = None, []
    for start, end in itertools.pairwise(cuts):
        frames, state = vae[1].decode(LATENTS[:, start:end], state)
        parts.append(frames)
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_state_may_be_continued_twice(vae):
    _, state = vae[1].decode(LATENTS[:, :2])
    once, _ = vae[1].decode(LATENTS[:, 2:3], state)
    again, _ = vae[1].decode(LATENTS[:, 2:3], state)
    assert np.array_equal(once, again)


def test_a_state_does_not_grow(vae):
    sizes = [
        sum(x.nbytes for x in state.tensors.values()) for _, state in vae[1].decode_steps(LATENTS)
    ]
    assert len(sizes) == 7 and len(set(sizes)) == 1


def test_frames_are_encoded_as_they_come(vae):
    taken = 0

    def camera():
        nonlocal taken
        for frame in VIDEO:
            taken += 1
            yield frame

    seen = []
    for index, latents in enumerate(vae[0].encode_steps(camera())):
        assert taken == 1 + 4 * index
        seen.append(latents)
    assert np.array_equal(np.concatenate(seen, axis=1), vae[0].encode(VIDEO))


def test_half_precision_graphs_get_and_give_float32(components, vae):
    encoder = VaeEncoder(
        *(runner_of(components[f"vae_encoder_{step}"], "float16") for step in ("first", "next")),
        vae[0].config,
    )
    latents = encoder.encode(VIDEO[:5])
    assert latents.dtype == np.float32
    assert np.abs(latents - vae[0].encode(VIDEO[:5])).max() < 0.02


@given(arrays(np.float32, (2, 4, 4, 3), elements=st.floats(-2, 2, width=32)))
def test_rounding_is_that_of_diffusers(frames):
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].clamp(-1, 1)
    pictures = VideoProcessor().postprocess_video(video, output_type="pil")[0]
    assert np.array_equal(to_uint8(frames), np.stack([np.asarray(x) for x in pictures]))


@pytest.mark.parametrize(
    ("count", "below", "above"), [(0, 1, 5), (2, 1, 5), (4, 1, 5), (12, 9, 13), (24, 21, 25)]
)
def test_counts_that_do_not_fit_are_refused_with_the_nearest(vae, count, below, above):
    message = (
        f"video: expected 1 + a multiple of 4 frames, got {count}. Use {below} or {above} frames."
    )
    with pytest.raises(ValueError) as error:
        vae[0].encode(VIDEO[:count])
    assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        list(vae[0].encode_steps(iter(VIDEO[:count])))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("video", "got"),
    [
        (np.zeros((1, 9, 12, 3), np.uint8), "uint8 (9, 12, 3)"),
        (np.zeros((1, 8, 10, 3), np.uint8), "uint8 (8, 10, 3)"),
        (np.zeros((1, 3, 8, 12), np.uint8), "uint8 (3, 8, 12)"),
        (np.zeros((1, 8, 12), np.uint8), "uint8 (8, 12)"),
        (np.zeros((1, 8, 12, 3), np.float32), "float32 (8, 12, 3)"),
    ],
)
def test_frames_that_do_not_fit_are_refused(vae, video, got):
    with pytest.raises(ValueError) as error:
        vae[0].encode(video)
    assert str(error.value) == (
        "video: expected frames of uint8 (H, W, 3) with H and W multiples of 4, "
        f"got {got}. Crop or resize the video."
    )


@pytest.mark.parametrize(
    ("latents", "got"),
    [
        (LATENTS[:3], "float32 (3, 7, 2, 3)"),
        (LATENTS[None], "float32 (1, 4, 7, 2, 3)"),
        (LATENTS[:, :0], "float32 (4, 0, 2, 3)"),
        (LATENTS.astype(np.float64), "float64 (4, 7, 2, 3)"),
    ],
)
def test_latents_that_do_not_fit_are_refused(vae, latents, got):
    with pytest.raises(ValueError) as error:
        vae[1].decode(latents)
    assert str(error.value) == (
        f"latents: expected float32 (4, F, h, w), got {got}. "
        "Give latents as the transformer knows them."
    )


def test_a_state_of_another_size_is_refused(vae):
    _, state = vae[1].decode(LATENTS[:, :1])
    with pytest.raises(ValueError, match=r"input 'state_00': expected float32"):
        vae[1].decode(LATENTS[:, 1:2, :, :2], state)


def test_a_chunk_is_decoded_with_one_state_in_hand(vae):
    _, decoder = vae
    states: list[weakref.ref[Array]] = []

    class Watched:
        graph = decoder.later.graph

        def run(self, inputs: Mapping[str, Array], weights=None) -> dict[str, Array]:
            assert sum(state() is not None for state in states) <= 1
            outputs = decoder.later.run(inputs, weights)
            outputs["next_state_00"] = outputs["next_state_00"].copy()
            states.append(weakref.ref(outputs["next_state_00"]))
            return outputs

    frames, _ = VaeDecoder(decoder.first, Watched(), decoder.config).decode(LATENTS)
    assert len(states) == LATENTS.shape[1] - 1
    assert (frames == decoder.decode(LATENTS)[0]).all()
