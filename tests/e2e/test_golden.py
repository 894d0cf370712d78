"""The golden cases of tests/golden, which diffusers and its scheduler computed."""

import numpy as np

import mc_runtime.transformer

TOLERANCE = 1e-4  # rounding alone leaves 4e-6


def generate(case):
    return case.pipeline.run(options=case.options, decode=False, **case.inputs).latents


def test_uncached_latents_equal_the_golden_ones(golden):
    latents = generate(golden)
    assert np.abs(latents - golden.expected["latents_uncached"]).max() <= TOLERANCE


def test_the_form_with_fused_attention_gives_the_same_latents(golden, monkeypatch):
    fused = golden.pipeline.transformer.fused_block
    runs = []
    monkeypatch.setattr(mc_runtime.transformer, "FUSED_ATTENTION_BYTES", 0)
    monkeypatch.setattr(fused, "run", lambda *given, run=fused.run: runs.append(1) or run(*given))
    latents = generate(golden)
    assert len(runs) > 0
    assert np.abs(latents - golden.expected["latents_uncached"]).max() <= TOLERANCE
