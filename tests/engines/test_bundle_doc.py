"""docs/bundle.md is enough to generate: its code, and the bundle, give diffusers' latents."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mc_engines.bundle import Bundle
from mc_engines.onnxruntime_runner import open_runner
from mc_export.checkpoint import load_checkpoint
from mc_export.export_bundle import export_bundle
from mc_runtime.sampler import init_sampler, sampler_step, sampler_table
from mc_runtime.schedule import step_matrix

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/skyreels-a"
TEXT = (ROOT / "docs/bundle.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("doc") / "bundle"
    export_bundle(load_checkpoint(GOLDEN), path)
    return Bundle.open(path)


@pytest.fixture(scope="module")
def doc():
    names: dict[str, object] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)), names)
    return SimpleNamespace(**names)


def make_run(bundle):
    runners = {name: open_runner(bundle, name, threads=2) for name in bundle.manifest.components}

    def run(component, layer=None, **inputs):
        weights = None if layer is None else bundle.layer_weights(component, layer, "fp32")
        return runners[component].run(inputs, weights)

    return run


def test_the_code_of_the_document_generates_the_golden_latents(bundle, doc):
    case = json.loads((GOLDEN / "case.json").read_text())
    given = np.load(GOLDEN / "inputs.npz")
    config, run = bundle.manifest.config["transformer"], make_run(bundle)
    size, steps = case["causal_block_size"], case["steps"]
    chunks = [given["noise"][:, i : i + size] for i in range(0, case["frames"], size)]
    sampler = sampler_table(steps, case["flow_shift"], "diffusers", "aliased")
    fps_id = np.array([0 if case["fps"] == 16 else 1])
    tables = run("timestep", timesteps=np.append(sampler.timesteps, 0), fps_id=fps_id).values()
    tokens = given["noise"][0].size // np.prod(config["patch_size"])
    branches = [
        (doc.encode_context(run, config, given[name]), doc.Cache(config, tokens))
        for name in ("prompt_embeds", "negative_prompt_embeds")
    ]

    def velocities(chunk, step):
        modulation, head_modulation = (np.repeat(table[step][None], size, 0) for table in tables)
        return [
            doc.chunk_pass(
                run, config, chunks[chunk], chunk, modulation, head_modulation, context, cache
            )
            for context, cache in branches
        ]

    samplers = [init_sampler() for _ in chunks]
    for updates in step_matrix(len(chunks), steps, case["ar_step"]).update:
        for chunk in np.flatnonzero(updates):
            cond, uncond = velocities(chunk, samplers[chunk].step)
            velocity = uncond + case["guidance_scale"] * (cond - uncond)
            chunks[chunk], samplers[chunk] = sampler_step(
                sampler, samplers[chunk], velocity, chunks[chunk]
            )
        for chunk in np.flatnonzero(updates):
            if samplers[chunk].step == steps:
                velocities(chunk, -1)
    expected = np.load(GOLDEN / "expected.npz")["latents_uncached"]
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), expected, rtol=0, atol=1e-4)


def test_a_partial_pass_recomputes_what_it_is_asked_to(bundle, doc):
    """Nothing has changed since the full pass, so reusing and recomputing come to the same."""
    config, run = bundle.manifest.config["transformer"], make_run(bundle)
    given = np.load(GOLDEN / "inputs.npz")
    latents = given["noise"][:, :5]
    rows = run("timestep", timesteps=np.array([900]), fps_id=np.array([1]))
    modulation, head = (np.repeat(rows[name], 5, axis=0) for name in rows)
    context = doc.encode_context(run, config, given["prompt_embeds"])
    cache = doc.Cache(config, 120)

    def velocity(**chosen):
        return doc.chunk_pass(run, config, latents, 0, modulation, head, context, cache, **chosen)

    full = velocity()
    np.testing.assert_allclose(velocity(rows=np.arange(0)), full, atol=1e-5)
    np.testing.assert_allclose(velocity(rows=np.array([3, 50, 7])), full, atol=1e-5)


def test_the_document_names_every_component_and_configuration_field(bundle):
    for name in bundle.manifest.components:
        assert f"`{name}`" in TEXT, name
    for name in bundle.manifest.config["transformer"]:
        assert f"`{name}`" in TEXT, name
    for name in bundle.manifest.to_json():
        assert f"| `{name}` |" in TEXT, name


def test_the_document_names_every_tensor(bundle):
    for component in bundle.manifest.components.values():
        for graph in component.graphs.values():
            for spec in (*graph.inputs, *graph.weights, *graph.outputs):
                assert f"`{spec.name}`" in TEXT, spec.name


def test_the_document_describes_every_number_of_the_parity_report(bundle):
    (entry, *_) = json.loads((bundle.path / "reports/parity.json").read_text())
    for name in entry:
        assert f"`{name}`" in TEXT.partition("## The parity report")[2], name
