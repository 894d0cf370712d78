"""NaN stops a generation at the chunk, and the message says where it was found."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mc_engines.errors import EngineError
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from motioncache import make_policy

OPTIONS = GenerationOptions(
    num_frames=37, height=32, width=32, num_inference_steps=4, ar_step=2, base_num_frames=37
)


def message(component, chunk, step):
    return (
        f"{component}: expected finite values, got NaN or infinity in chunk {chunk}, step {step}. "
        "Check the bundle with mc-inspect --verify, and the latents."
    )


@pytest.fixture
def damaged(tiny_bundle, tmp_path):
    """A copy of the bundle that a test may damage."""
    return shutil.copytree(tiny_bundle, tmp_path / "damaged.bundle")


def fill_with_nan(path):
    """Overwrite the float32 values of a file that holds nothing else."""
    path.write_bytes(np.full(path.stat().st_size // 4, np.nan, np.float32).tobytes())


@pytest.mark.parametrize("layer", [0, 1])
def test_nan_in_a_weight_of_the_blocks(damaged, layer):
    path = damaged / f"weights/block.{layer:02d}.safetensors"
    weights = {name: np.array(x) for name, x in load_file(path).items()}
    weights["ffn_up.weight"][3, 4] = np.nan
    save_file(weights, path)
    with pytest.raises(EngineError) as error:
        VideoPipeline.from_bundle(damaged, threads=1).run("a cat", options=OPTIONS)
    assert str(error.value) == message("block", 0, 1)


@pytest.mark.parametrize("component", ["embed", "head"])
def test_nan_in_weights_inside_a_graph(damaged, component):
    fill_with_nan(damaged / f"onnx/{component}.onnx.data")
    with pytest.raises(EngineError) as error:
        VideoPipeline.from_bundle(damaged, threads=1).run("a cat", options=OPTIONS)
    assert str(error.value) == message(component, 0, 1)


def test_nan_where_velocities_are_kept(damaged):
    fill_with_nan(damaged / "onnx/head.onnx.data")
    rule = {"threshold": 1.0, "coefficients": (1.0, 0.0), "warmup_steps": 1, "extrapolation": 1.0}
    with pytest.raises(EngineError) as error:
        VideoPipeline.from_bundle(damaged, threads=1).run(
            "a cat", options=OPTIONS, policy=make_policy("flowcache", rule)
        )
    assert str(error.value) == message("head", 0, 1)


def test_nan_in_the_decoder(damaged):
    fill_with_nan(damaged / "onnx/vae_decoder_next.onnx.data")
    pipeline = VideoPipeline.from_bundle(damaged, threads=1)
    with pytest.raises(EngineError) as error:
        pipeline.run("a cat", options=OPTIONS)
    assert str(error.value) == (
        "vae_decoder: expected finite values, got NaN or infinity in chunk 0. "
        "Check the bundle with mc-inspect --verify."
    )
    assert pipeline.run("a cat", options=OPTIONS, decode=False).frames is None


class FailingRunner:
    """Answers NaN from one call on."""

    def __init__(self, runner, calls):
        self.runner, self.left = runner, calls
        self.graph = runner.graph

    def run(self, inputs, weights=None):
        outputs = self.runner.run(inputs, weights)
        self.left -= 1
        return outputs if self.left > 0 else {name: x * np.nan for name, x in outputs.items()}


def failing(pipeline, component, calls):
    """A pipeline on the same bundle, one of whose components fails."""
    runners = dict(pipeline.transformer.runners)
    runners[component] = FailingRunner(runners[component], calls)
    other = VideoPipeline(pipeline.bundle, threads=1)
    other.transformer = replace(pipeline.transformer, runners=runners)
    return other


# With 4 steps and a lag of 2 the second chunk takes its steps 3 and 4 after the first is finished,
# and before them the first is passed once more. Guidance doubles every call of block and head; the
# block runs for two layers; embed runs once per step, and once for the clean pass.
@pytest.mark.parametrize(
    ("component", "calls", "chunk", "step", "finished"),
    [
        ("head", 3, 0, 2, 0),
        ("head", 8, 1, 1, 0),
        ("head", 13, 1, 3, 1),
        ("block", 24 + 4 + 4, 1, 3, 1),
        ("embed", 6 + 1 + 2, 1, 4, 1),
    ],
)
def test_nan_that_appears_on_the_way(tiny, component, calls, chunk, step, finished):
    pipeline = failing(tiny, component, calls)
    made = []
    with pytest.raises(EngineError) as error:
        made.extend(chunk.index for chunk in pipeline.generate("a cat", options=OPTIONS))
    assert str(error.value) == message(component, chunk, step)
    assert made == list(range(finished))


@pytest.mark.parametrize("layout", [(57, 17), (53, 21)], ids=["overlap", "overlap cut"])
def test_chunks_are_counted_through_all_windows(tiny, layout):
    """The second window's second chunk is the third of the video."""
    frames, overlap = layout
    options = replace(OPTIONS, num_frames=frames, overlap_history=overlap)
    with pytest.raises(EngineError) as error:
        failing(tiny, "head", 16 + 1).run("a cat", options=options)
    assert str(error.value) == message("head", 2, 1)


@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "negative_prompt_embeds"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_an_input(tiny, name, value):
    inputs = {
        "latents": np.zeros((16, 10, 4, 4), np.float32),
        "prompt_embeds": np.zeros((1, 3, 48), np.float32),
        "negative_prompt_embeds": np.zeros((1, 3, 48), np.float32),
    }
    inputs[name][0, 1, 2] = value
    with pytest.raises(ValueError) as error:
        tiny.generate(options=OPTIONS, **inputs)
    assert str(error.value) == f"{name}: expected finite values, got NaN or infinity."
