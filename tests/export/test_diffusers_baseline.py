"""diffusers as mc-bench runs it: the same video as ours, and what its process answers."""

import io
import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from mc_engines.errors import MissingExtraError
from mc_export.checkpoint import load_checkpoint
from mc_export.diffusers_baseline import Baseline, serve
from mc_runtime.options import GenerationOptions

SHORT = GenerationOptions(num_frames=37, height=64, width=64, num_inference_steps=4, ar_step=2)
# Two windows: the later one takes over 17 frames, with noise added.
LONG = GenerationOptions(
    num_frames=57, height=64, width=64, num_inference_steps=3, ar_step=1,
    base_num_frames=37, overlap_history=17, guidance_scale=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def baseline(tiny_checkpoint):
    return Baseline(load_checkpoint(tiny_checkpoint))


def inputs_for(options):
    draw = np.random.default_rng(5)
    arrays = {
        "latents": draw.standard_normal((16, (options.num_frames + 3) // 4, 8, 8), np.float32),
        "prompt_embeds": draw.standard_normal((1, 12, 48), np.float32),
    }
    if options.guidance_scale > 1:
        arrays["negative_prompt_embeds"] = draw.standard_normal((1, 12, 48), np.float32)
    return arrays


@pytest.mark.parametrize("options", [SHORT, LONG], ids=["short", "long"])
def test_its_latents_are_those_of_none(baseline, tiny, options):
    arrays = inputs_for(options)
    ours = tiny.run(**arrays, options=options, decode=False).latents
    theirs = baseline.denoise(asdict(options), **arrays)
    assert theirs.dtype == np.float32
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    other = baseline.denoise(asdict(options), **(arrays | {"latents": -arrays["latents"]}))
    assert np.abs(theirs - other).max() > 0.1


def test_its_frames_are_those_of_diffusers(baseline, diffusers, tiny_checkpoint):
    arrays = inputs_for(SHORT)
    oracle = diffusers(tiny_checkpoint).run(SHORT, output_type="np", **arrays)
    frames = baseline.decode(baseline.denoise(asdict(SHORT), **arrays))
    assert frames.dtype == np.uint8
    np.testing.assert_allclose(frames, oracle * 255, atol=0.51)


def test_without_a_vae_there_are_no_frames(tiny_checkpoint):
    checkpoint = replace(load_checkpoint(tiny_checkpoint), vae=None)
    assert Baseline(checkpoint).decode(inputs_for(SHORT)["latents"]) is None


def test_it_answers_each_request_with_its_seconds(baseline, tmp_path):
    arrays = inputs_for(SHORT)
    np.savez(tmp_path / "in.npz", **arrays)
    request = {"inputs": str(tmp_path / "in.npz"), "options": asdict(SHORT)}
    requests = [
        request | {"rows": 1, "output": str(tmp_path / "warm.npz")},
        request | {"rows": None, "output": None},
        request | {"rows": None, "output": str(tmp_path / "out.npz")},
    ]
    replies = io.StringIO()
    serve(baseline, map(json.dumps, requests), replies)
    warm, *whole = (json.loads(line) for line in replies.getvalue().splitlines())
    assert [set(reply) for reply in (warm, *whole)] == [{"seconds"}] * 3
    assert 0 < warm["seconds"] < min(reply["seconds"] for reply in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz", "out.npz"]
    with np.load(tmp_path / "out.npz") as stored:
        assert stored["frames"].shape == (37, 64, 64, 3)
        np.testing.assert_array_equal(stored["latents"], baseline.denoise(asdict(SHORT), **arrays))


@pytest.mark.parametrize("absent", ["diffusers", "transformers"])
def test_a_missing_library_is_named_with_its_command(tiny_checkpoint, monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingExtraError) as caught:
        Baseline(load_checkpoint(tiny_checkpoint))
    assert str(caught.value) == (
        "baseline: expected diffusers and transformers, got none: import of "
        f"{absent} halted; None in sys.modules. Run: pip install diffusers==0.42.1 transformers"
    )


def test_an_error_is_a_reply(tmp_path):
    command = [sys.executable, "-m", "mc_export.diffusers_baseline", str(tmp_path / "x")]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    (reply,) = result.stdout.splitlines()
    assert result.returncode == 1
    assert json.loads(reply)["error"].startswith(f"{tmp_path / 'x'}: expected a diffusers folder")
