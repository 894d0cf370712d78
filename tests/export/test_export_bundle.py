"""From an opened checkpoint to a bundle, or to nothing.

Tracing and proving are what takes time, and other files test them. Here, but for two real exports,
a stand-in for the tracer makes graphs that give their weights; all else is the exporter's own.
"""

import json
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

from mc_engines.bundle import Bundle
from mc_engines.errors import BundleError, CheckpointError, ParityError
from mc_engines.manifest import hash_file
from mc_engines.published import PUBLISHED, UMT5_XXL, WAN21_VAE
from mc_engines.verify import find_faults
from mc_export import write_component
from mc_export.checkpoint import Checkpoint, Part, load_checkpoint
from mc_export.export_bundle import (
    count_steps,
    expected_tensors,
    export_bundle,
    stored_precision,
)
from mc_export.parity import Comparison
from mc_export.random_source import RandomSource
from mc_export.skyreels_components import describe_transformer
from mc_export.write_component import STORED_TYPES

CONFIGS = {
    "transformer": dict(PUBLISHED["skyreels-df-1.3b-540p"].transformer)
    | dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=3)
    | dict(text_dim=16, freq_dim=16),
    "text_encoder": dict(UMT5_XXL)
    | dict(d_model=16, d_kv=4, num_heads=2, d_ff=24, num_layers=2, vocab_size=40),
    "vae": dict(WAN21_VAE) | dict(base_dim=4, num_res_blocks=1, dim_mult=[1, 1, 2, 2]),
}
SAFE_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Source(RandomSource):
    """Random tensors, some of them replaced, added (with a value) or left out (None)."""

    def __init__(self, shapes, dtype=torch.float32, changes=None):
        super().__init__(shapes, dtype, seed=0)
        self.changes = changes or {}

    def names(self):
        removed = {name for name, value in self.changes.items() if value is None}
        return (super().names() | self.changes.keys()) - removed

    def shape(self, name):
        return tuple(self.load(name).shape)

    def dtype(self, name):
        return self.load(name).dtype

    def load(self, name):
        return self.changes[name] if name in self.changes else super().load(name)


def make_checkpoint(*parts, dtypes=None, **changes):
    """A checkpoint of these parts beside the transformer; changes are by part."""
    bare = Checkpoint(
        Path(), *(Part(config, Source({})) for config in CONFIGS.values()), None, None
    )
    made = {
        name: Part(
            CONFIGS[name],
            Source(shapes, (dtypes or {}).get(name, torch.float32), changes.get(name)),
        )
        for name, shapes in expected_tensors(bare).items()
        if name in ("transformer", *parts)
    }
    return Checkpoint(
        Path(), made["transformer"], made.get("text_encoder"), made.get("vae"), None, None
    )


def trace_nothing(source):
    """A graph that gives the component's weights, in place of one that computes."""
    parameters = dict(source.module.named_parameters())
    values, nodes, outputs = [], [], []
    for name, parameter in parameters.items():
        kind = ir.TensorType(ir.DataType.FLOAT)
        value = ir.Value(name=name, shape=ir.Shape(parameter.shape), type=kind)
        output = ir.Value(name=f"{name}_out", shape=value.shape, type=kind)
        if not source.layers:
            value.const_value = ir.tensor(parameter.detach().numpy(), name=name)
        values.append(value)
        nodes.append(ir.Node("", "Identity", [value], outputs=[output]))
        outputs.append(output)
    baked = [] if source.layers else values
    inputs = values if source.layers else []
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=baked, opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(write_component, "export_component", trace_nothing)
    monkeypatch.setattr(write_component, "_prove", lambda written: [])


# ---- what is stored, and how


@pytest.mark.parametrize("asked", [None, "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("own", STORED_TYPES)
def test_weights_are_stored_as_asked_or_as_they_are(quick, tmp_path, own, asked):
    checkpoint = make_checkpoint("text_encoder", dtypes=dict.fromkeys(CONFIGS, STORED_TYPES[own]))
    export_bundle(checkpoint, tmp_path / "bundle", asked)
    bundle = Bundle.open(tmp_path / "bundle")
    stored = asked or own
    assert SAFE_NAMES[bundle.manifest.weights_dtype] == stored
    for path in bundle.manifest.files:
        if path.startswith("weights/"):
            kinds = {np.dtype(x.dtype).name for x in bundle.map_tensors(path).values()}
            assert {SAFE_NAMES[kind] for kind in kinds} == {stored}
        elif path.endswith(".onnx"):
            proto = onnx.load(bundle.path / path, load_external_data=False)
            outside = {x.data_type for x in proto.graph.initializer if x.external_data}
            assert outside <= {write_component.DATA_TYPES[stored]}


def test_parts_and_tensors_of_different_types_each_keep_their_own(quick, tmp_path):
    norm = "blocks.1.norm2.weight"
    checkpoint = make_checkpoint(
        "text_encoder",
        dtypes={"transformer": torch.bfloat16, "text_encoder": torch.float16},
        transformer={norm: torch.ones(24)},
    )
    assert stored_precision(checkpoint.transformer) == "fp32"  # the narrowest that holds them all
    assert stored_precision(checkpoint.text_encoder) == "fp16"
    export_bundle(checkpoint, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.weights_dtype == "float32"
    block = bundle.map_tensors("weights/block.01.safetensors")
    assert block["cross_norm.weight"].dtype == np.float32
    assert block["qkv.weight"].dtype.name == "bfloat16"
    assert bundle.map_tensors("weights/text_embed.safetensors")["table"].dtype == np.float16


@pytest.mark.parametrize("count", range(3))
def test_steps_are_counted_and_what_is_missing_is_said(quick, tmp_path, count):
    for parts in combinations(("text_encoder", "vae"), count):
        checkpoint, words = make_checkpoint(*parts), []
        export_bundle(checkpoint, tmp_path / "bundle", overwrite=True, report=words.append)
        assert len(words) == len(set(words)) == count_steps(checkpoint)
        manifest = Bundle.open(tmp_path / "bundle").manifest
        assert manifest.missing == tuple(
            part for part in ("text_encoder", "tokenizer", "vae") if part not in parts
        )
        assert set(manifest.config) == {"transformer", *parts}
        assert manifest.model is None


def test_a_whole_checkpoint_is_a_whole_bundle(tiny_checkpoint, tiny_bundle):
    """A real export: of every part, the transformer's weights in shards."""
    shards = [load_file(path) for path in (tiny_checkpoint / "transformer").glob("*.safetensors")]
    assert len(shards) > 1
    stored = {name: tensor for shard in shards for name, tensor in shard.items()}
    bundle = Bundle.open(tiny_bundle)
    assert list(find_faults(tiny_bundle)) == []
    assert (bundle.manifest.family, bundle.manifest.missing) == ("skyreels", ())
    checkpoint = load_checkpoint(tiny_checkpoint)
    described = describe_transformer(checkpoint.transformer.config)
    assert bundle.manifest.config["transformer"] == described
    assert bundle.manifest.config["text_encoder"]["max_tokens"] == 512
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copied, original = bundle.path / "tokenizer" / name, checkpoint.tokenizer / name
        assert copied.read_bytes() == original.read_bytes()
    for layer in range(2):
        weights = bundle.layer_weights("block", layer, "fp32")
        matrix = stored[f"blocks.{layer}.ffn.net.0.proj.weight"].T
        np.testing.assert_array_equal(weights["ffn_up.weight"], matrix)


def test_every_graph_has_a_comparison_in_the_report(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    rows = [
        Comparison(**row) for row in json.loads((tiny_bundle / "reports/parity.json").read_text())
    ]
    assert all(row.passes for row in rows)
    expected = {
        (name, form, layer, output.name)
        for name, component in manifest.components.items()
        for form, graph in component.graphs.items()
        for layer in ((0, 1) if len(component.weight_files) > 1 else (0,))
        for output in graph.outputs
    }
    compared = {(row.component, row.form, row.layer or 0, row.output) for row in rows}
    assert compared == expected
    assert len(rows) == len(compared)


# ---- an error leaves nothing


def assert_nothing_is_left(folder):
    assert list(folder.iterdir()) == []


FETCH = "Fetch the checkpoint again, or ask whoever trained it."
FIT = "Check that weights and configuration belong together."


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "transformer",
            {"blocks.2.attn1.to_q.bias": None},
            "transformer: expected {n} tensors, got {n-1}: 1 missing (blocks.2.attn1.to_q.bias). ",
        ),
        (
            "transformer",
            {"blocks.3.norm2.bias": torch.zeros(24)},
            "transformer: expected {n} tensors, got {n+1}: 1 unexpected (blocks.3.norm2.bias). ",
        ),
        (
            "transformer",
            {"proj_out.bias": torch.zeros(65)},
            "transformer: expected {n} tensors, got {n}: "
            "1 wrongly shaped (proj_out.bias (65,) instead of (64,)). ",
        ),
        (
            "text_encoder",
            {"shared.weight": None},
            "text_encoder: expected {n} tensors, got {n-1}: 1 missing (shared.weight). ",
        ),
        (
            "vae",
            {"decoder.conv_in.bias": None, "decoder.conv_in.biases": torch.zeros(8)},
            "vae: expected {n} tensors, got {n}: "
            "1 missing (decoder.conv_in.bias); 1 unexpected (decoder.conv_in.biases). ",
        ),
    ],
    ids=["missing", "unexpected", "shape", "text-encoder", "vae"],
)
def test_tensors_that_do_not_fit_are_named_before_the_work(tmp_path, part, change, message):
    checkpoint = make_checkpoint("text_encoder", "vae", **{part: change})
    count = len(expected_tensors(make_checkpoint("text_encoder", "vae"))[part])
    for text, number in (("{n}", count), ("{n-1}", count - 1), ("{n+1}", count + 1)):
        message = message.replace(text, str(number))
    words = []
    with pytest.raises(CheckpointError) as error:
        export_bundle(checkpoint, tmp_path / "bundle", report=words.append)
    assert str(error.value) == message + FIT
    assert words == []
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "condition_embedder.text_embedder.linear_1.weight"),
        ("transformer", "blocks.1.attn2.norm_k.weight"),
        ("transformer", "fps_embedding.weight"),
        ("transformer", "blocks.2.scale_shift_table"),
        ("transformer", "proj_out.bias"),
        ("text_encoder", "shared.weight"),
        ("text_encoder", "encoder.block.1.layer.1.DenseReluDense.wo.weight"),
        ("text_encoder", "encoder.final_layer_norm.weight"),
        ("vae", "decoder.norm_out.gamma"),
        ("vae", "quant_conv.weight"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(quick, tmp_path, part, name, bad):
    tensor = getattr(make_checkpoint(part), part).tensors.load(name)
    tensor.view(-1)[-1] = bad
    with pytest.raises(CheckpointError) as error:
        export_bundle(make_checkpoint(part, **{part: {name: tensor}}), tmp_path / "bundle")
    assert str(error.value) == (
        f"tensor '{name}': expected finite values, got NaN or infinity. {FETCH}"
    )
    assert_nothing_is_left(tmp_path)


def test_a_graph_that_does_not_pass_ends_the_export(quick, tmp_path, monkeypatch):
    bad = Comparison("head", "bf16", None, "patches", 1.0, 0.5, 0.0, 1.0, 0.04)
    monkeypatch.setattr(
        write_component, "_prove", lambda written: [bad] if written.spec.name == "head" else []
    )
    words = []
    with pytest.raises(ParityError, match=r"^head, bf16, output 'patches': "):
        export_bundle(make_checkpoint("vae"), tmp_path / "bundle", report=words.append)
    assert words[-1] == "head: compared with torch"
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("stop", [1, 5, 22])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupt_leaves_what_was_there(quick, tmp_path, error, stop, overwrite):
    target = tmp_path / "bundle"
    if overwrite:
        export_bundle(make_checkpoint(), target)
        before = hash_file(target / "manifest.json")
    steps = iter(range(1, 100))

    def interrupt(words):
        if next(steps) == stop:
            raise error

    assert count_steps(make_checkpoint()) == 22  # so that the last stop is the last step
    with pytest.raises(error):
        export_bundle(make_checkpoint(), target, "bf16", overwrite, interrupt)
    if overwrite:
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
        assert hash_file(target / "manifest.json") == before
        assert list(find_faults(target)) == []
    else:
        assert_nothing_is_left(tmp_path)


def test_a_killed_export_leaves_nothing_that_looks_whole(quick, tmp_path, tiny_checkpoint):
    """A real export is killed between two of its files; the next one cleans up."""
    target = tmp_path / "bundle"
    command = ["--model", "skyreels", "--checkpoint", str(tiny_checkpoint), "-o", str(target)]
    script = f"import mc_export.cli; mc_export.cli.main({command})"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as run:
        for line in run.stderr:
            if line.startswith("text_projection: compared with torch"):
                break
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".bundle.partial-")
    assert (left / "onnx" / "text_projection.fp32.onnx").is_file()
    for path in (left, target):
        with pytest.raises(BundleError):
            Bundle.open(path)
    export_bundle(load_checkpoint(tiny_checkpoint), target)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert list(find_faults(target)) == []


# ---- what is at the target already


def test_a_bundle_is_replaced_only_if_asked(quick, tmp_path):
    target, words = tmp_path / "bundle", []
    export_bundle(make_checkpoint(), target)
    with pytest.raises(BundleError) as error:
        export_bundle(make_checkpoint("vae"), target, report=words.append)
    assert str(error.value) == (
        f"{target}: expected a name that is free, got one that exists. "
        "Choose another output, or --overwrite."
    )
    assert words == []
    assert "vae" not in Bundle.open(target).manifest.config
    export_bundle(make_checkpoint("vae"), target, overwrite=True)
    assert "vae" in Bundle.open(target).manifest.config
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_is_no_bundle_is_never_replaced(quick, tmp_path):
    target, words = tmp_path / "bundle", []
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(BundleError) as error:
        export_bundle(make_checkpoint(), target, overwrite=True, report=words.append)
    assert str(error.value) == (
        f"{target}: expected a bundle to overwrite, got something else. "
        "Choose another output, or remove it yourself."
    )
    assert words == []
    assert (target / "thesis.txt").read_text() == "mine"
