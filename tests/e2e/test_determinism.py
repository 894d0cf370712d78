"""The same request gives the same bytes, also beside another one."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline

OPTIONS = GenerationOptions(num_inference_steps=6, base_num_frames=37)
REQUESTS = [
    # Two windows, so that noise is drawn for a prefix too.
    ("a cat walks", replace(OPTIONS, num_frames=57, height=32, width=48, seed=1)),
    ("rain on a roof", replace(OPTIONS, num_frames=37, height=48, width=32, seed=2)),
]


def generate(pipeline, request):
    prompt, options = request
    video = pipeline.run(prompt, options=options)
    return video.latents.tobytes(), video.frames.tobytes()


@pytest.fixture(scope="module")
def alone(tiny_bundle):
    """What each request gives on a pipeline of its own."""
    return [generate(VideoPipeline.from_bundle(tiny_bundle, threads=2), r) for r in REQUESTS]


def test_a_pipeline_repeats_itself(tiny_bundle, alone):
    pipeline = VideoPipeline.from_bundle(tiny_bundle, threads=2)
    assert [generate(pipeline, request) for request in REQUESTS * 2] == alone * 2


def test_the_seed_decides_the_noise(tiny_bundle, alone):
    prompt, options = REQUESTS[1]  # one window, so that no noise is drawn for a prefix
    pipeline = VideoPipeline.from_bundle(tiny_bundle, threads=2)
    assert generate(pipeline, (prompt, replace(options, seed=9))) != alone[1]


def test_two_threads_share_a_pipeline(tiny_bundle, alone):
    pipeline = VideoPipeline.from_bundle(tiny_bundle, threads=2)
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda request: generate(pipeline, request), REQUESTS * 2))
    assert made == alone * 2


def test_two_generations_take_turns(tiny_bundle, alone):
    """Chunks of one may be asked for between those of another, in the same thread."""
    pipeline = VideoPipeline.from_bundle(tiny_bundle, threads=2)
    first, second = (pipeline.generate(prompt, options=options) for prompt, options in REQUESTS)
    chunks = [next(first), next(second), next(first), next(second), next(first)]
    frames = b"".join(chunk.frames.tobytes() for chunk in chunks[::2])
    assert frames == alone[0][1]
    assert b"".join(chunk.frames.tobytes() for chunk in chunks[1::2]) == alone[1][1]
