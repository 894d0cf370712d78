"""The exported MAGI-1 graphs in ONNX Runtime beside one forward of the original code.

tests/golden/README-magi.md describes the cases; the code of docs/bundle.md makes patches and rotary
tables. A forward sees the segments of a window at once: a
finished chunk, those being denoised and, in a distilled model, a copy of the oldest of these. Here
they run one by one over one cache, as the graphs are made for.
"""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mc_engines.bundle import Bundle
from mc_engines.onnxruntime_runner import OnnxRuntimeRunner
from mc_engines.verify import find_faults
from mc_export.parity import Comparison

GOLDEN = Path(__file__).parents[1] / "golden"
FRAMES = 6
# By case and branch: whose text the chunks see, and the row of the null caption that stands for it.
BRANCHES = {
    ("magi-a", "main"): (True, 1),
    ("magi-b", "text"): (True, 1),
    ("magi-b", "null"): (False, 0),
    ("magi-b", "uncond"): (False, 0),
}


TEXT = (Path(__file__).parents[2] / "docs/bundle.md").read_text(encoding="utf-8")
DOC: dict[str, object] = {}
exec("\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)), DOC)


class Model:
    """A bundle whose graphs are called by name, and the golden data of its case."""

    def __init__(self, folder, name):
        self.bundle = Bundle.open(folder)
        self.config = self.bundle.manifest.config["transformer"]
        self.case = json.loads((GOLDEN / name / "case.json").read_text())
        self.golden = dict(np.load(GOLDEN / name / "expected.npz"))
        self.runner = cache(self._open)
        self.weights = cache(self.bundle.layer_weights)
        self.null_text = self.bundle.map_tensors("weights/null_text.safetensors")["embedding"]

    def _open(self, component, form):
        graph = self.bundle.graph(component, form)
        return OnnxRuntimeRunner(graph, self.bundle.graph_path(component, form), threads=1)

    def run(self, component, layer=None, form="fp32", **inputs):
        weights = None if layer is None else self.weights(component, layer, "fp32")
        return self.runner(component, form).run(inputs, weights)


class Forward:
    """The segments of one branch: what each attends to, its modulation and its positions."""

    def __init__(self, model, branch, form="fp32"):
        self.model, self.form, golden = model, form, model.golden
        prompted, row = BRANCHES[model.case["name"], branch]
        alone = branch == "uncond"
        x = golden["unit_x"].reshape(
            golden["unit_x"].shape[0], -1, FRAMES, *golden["unit_x"].shape[2:]
        )
        segments = range(1, x.shape[1]) if alone else range(x.shape[1])
        chunks = len(golden["y_text"])
        self.latents = [x[:, segment] for segment in segments]
        self.tokens = DOC["to_patches"](self.latents[0], model.config).shape[1]
        self.first_frames = [0 if alone else FRAMES * segment for segment in segments]
        self.ranges = [golden["unit_kv_range"][segment] for segment in segments]
        if alone:
            self.ranges = [(i * self.tokens, (i + 1) * self.tokens) for i in range(len(segments))]
        self.texts = []
        for segment in segments:
            chunk = segment if segment < chunks else 1  # the copy of the oldest
            seen = golden["y_text"][chunk][golden["y_mask"][chunk] == 1]
            self.texts.append(seen if prompted and segment else model.null_text)
        times = golden["unit_t"][list(segments)]
        rows = np.full(len(times), row)
        step = {"distill": np.full(len(times), model.case["num_steps"] / 2, np.float32)}
        self.modulation = model.run(
            "timestep",
            timesteps=times,
            null_row=rows,
            **(step if model.config["distilled"] else {}),
        )["modulation"]
        shape = (
            1,
            model.config["key_heads"],
            len(segments) * self.tokens,
            model.config["head_dim"],
        )
        # What no map names is never read.
        self.cache = {
            name: [np.full(shape, 1e3, np.float32) for _ in range(model.config["layers"])]
            for name in ("k_cache", "v_cache")
        }

    def patches(self, segment):
        return DOC["to_patches"](self.latents[segment], self.model.config)

    def embed(self, segment):
        return self.model.run("embed", patches=self.patches(segment))["x"]

    def block(self, layer, segment, x, rows, padding=0):
        """One layer over some tokens of a segment; the others' keys are those in the cache."""
        first, slots = segment * self.tokens, self.cache["k_cache"][0].shape[2]
        kv_map = np.arange(*self.ranges[segment], dtype=np.int32)
        kv_map[first + rows - self.ranges[segment][0]] = slots + np.arange(len(rows))
        _, _, height, width = self.latents[segment].shape
        grid = FRAMES, height // 2, width // 2
        angles = DOC["magi_rotary_tables"](self.first_frames[segment], *grid, self.model.config)
        padded = np.concatenate([rows, np.zeros(padding, np.int64)])
        text = self.model.run(
            "text_projection", embedding=np.asarray(self.texts[segment], np.float32)[None]
        )["text"]
        outputs = self.model.run(
            "block",
            layer,
            self.form,
            x=np.pad(x, ((0, 0), (0, padding), (0, 0)), constant_values=1e3),
            modulation=self.modulation[segment : segment + 1],
            cos=angles[0][padded],
            sin=angles[1][padded],
            **self.model.run("context", layer, text=text),
            **{name: layers[layer] for name, layers in self.cache.items()},
            kv_map=kv_map,
        )
        for kind in ("k", "v"):
            new = outputs[f"{kind}_new"][:, :, : len(rows)]
            self.cache[f"{kind}_cache"][layer][:, :, first + rows] = new
        return outputs["y"][:, : len(rows)]

    def run(self):
        """Output and hidden states of all segments."""
        x = [self.embed(segment) for segment in range(len(self.latents))]
        hidden = []
        for layer in range(self.model.config["layers"]):
            x = [
                self.block(layer, segment, tokens, np.arange(self.tokens))
                for segment, tokens in enumerate(x)
            ]
            hidden.append(np.concatenate(x, axis=1)[0])
        rows = [self.model.run("head", out=tokens)["patches"] for tokens in x]
        _, *grid = self.latents[0].shape
        return [DOC["from_patches"](each, *grid, self.model.config) for each in rows], hidden


@pytest.fixture(scope="module")
def model(magi_bundle):
    return cache(lambda name: Model(magi_bundle(name), name))


@pytest.mark.parametrize("form", ["fp32", "fp32-mha"])
@pytest.mark.parametrize(("name", "branch"), BRANCHES, ids=map("-".join, BRANCHES))
def test_a_forward_equals_the_original_code(model, name, branch, form):
    model = model(name)
    golden, tolerance = model.golden, model.case["tolerances"]["velocity_max_abs"]
    outputs, hidden = Forward(model, branch, form).run()
    expected = golden[f"unit_{branch}_out"]
    if branch == "uncond":
        got = np.stack(outputs)
    else:
        got = np.concatenate(outputs, axis=1)
        for layer, states in enumerate(hidden):
            reference = golden[f"unit_{branch}_hidden{layer}"]
            assert np.abs(states[golden["unit_rows"]] - reference).max() <= tolerance
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance


def test_recomputed_tokens_equal_those_of_a_full_pass(model):
    """Padding rows are named by no map; tokens that are not recomputed are in the cache."""
    forward = Forward(model("magi-b"), "text")
    forward.run()
    rows, segment = np.array([3, 4, 60, 143]), 2
    x = forward.embed(segment)
    everything = np.arange(forward.tokens)
    full = forward.block(0, segment, x, everything)[:, rows]
    partial = forward.block(0, segment, x[:, rows], rows, padding=3)
    np.testing.assert_allclose(partial, full, atol=2e-5)
    other = x[:, rows] + 1
    assert np.abs(forward.block(0, segment, other, rows) - full).max() > 0.1


@pytest.mark.parametrize("name", ["magi-a", "magi-b"])
def test_every_graph_was_held_against_torch(model, name):
    bundle = model(name).bundle
    report = json.loads((bundle.path / "reports/parity.json").read_text())
    rows = [Comparison(**row) for row in report]
    assert all(row.passes and row.own_error is None for row in rows)
    forms = {(row.component, row.form) for row in rows}
    assert forms == {
        (component, form)
        for component, spec in bundle.manifest.components.items()
        for form in spec.graphs
    }
    low = {form for component, form in forms if component not in ("timestep",)}
    assert low == {"fp32", "fp16", "bf16", "fp32-mha"}
    assert list(find_faults(bundle.path)) == []


def test_the_manifest_says_what_is_there(model):
    manifest = model("magi-a").bundle.manifest
    assert (manifest.family, manifest.model) == ("magi", None)
    assert manifest.missing == ("text_encoder", "tokenizer", "vae")
    assert list(manifest.components) == [
        *("text_projection", "context", "timestep", "embed", "block", "head", "motion")
    ]
    assert manifest.config["schedule"] == {
        "num_inference_steps": 16,
        "chunk_frames": 6,
        "window_chunks": 4,
        "kv_ranges": [5, 4, 3, 2],
        "clean_kv_range": 1,
        "clean_timestep": 0.9999,
        "guidance_passes": 1,
        "guidance_timesteps": [0.0, 0.0217, 0.1, 0.3, 0.999],
        "history_guidance_scales": [1.5, 1.5, 1.5, 1.0, 1.0],
        "text_guidance_scales": [7.5, 7.5, 7.5, 0.0, 0.0],
        "nearly_clean_timestep": 0.3,
        "shortcut_mode": "8,16,16",
        "fps": 24,
        "temporal_factor": 4,
    }
    assert manifest.config["video"] == {"height": 64, "width": 96, "num_frames": 120}
    assert model("magi-b").bundle.manifest.config["schedule"]["guidance_passes"] == 3


def test_the_document_names_what_a_bundle_holds(model):
    section = TEXT.partition("## Family `magi`")[2].partition("\n## ")[0]
    manifest = model("magi-a").bundle.manifest
    for part in ("transformer", "schedule"):
        for name in manifest.config[part]:
            assert f"`{name}`" in section, name
    for component in manifest.components.values():
        assert f"`{component.name}`" in section
        for spec in component.graphs["fp32"].weights:
            assert f"`{spec.name}`" in section or f"`{spec.name} [" in section, spec.name
        for graph in component.graphs.values():
            for spec in (*graph.inputs, *graph.outputs):
                assert f"`{spec.name}`" in section, spec.name


def test_the_null_caption_is_stored_as_far_as_it_is_seen(model):
    for name in ("magi-a", "magi-b"):
        loaded = model(name)
        assert loaded.null_text.shape == (50, 32)
        assert loaded.golden["null_mask"].sum() == 50
