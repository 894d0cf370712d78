"""`fuse_attention` in ONNX Runtime beside the plain form, and what it refuses."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_export.passes.fuse_attention import CONTRIB, fuse_attention

# Self-attention over gathered keys, a sum, then cross-attention: as in the transformer's block.
PLAIN = """
<ir_version: 10, opset_import: ["" : 20]>
attention (float[1, {heads}, K, {size}] q, float[1, {heads}, M, {size}] k,
  float[1, {heads}, M, {size}] v, float[1, {heads}, T, {size}] cross_k,
  float[1, {heads}, T, {size}] cross_v)
  => (float[1, K, {width}] y)
<float half = {{0.5}}, int64[3] flat = {{1, -1, {width}}},
 int64[4] split = {{1, -1, {heads}, {size}}}>
{{
  scaled = Mul(q, half)
  kt = Transpose<perm = [0, 1, 3, 2]>(k)
  scores = MatMul(scaled, kt)
  shares = Softmax<axis = -1>(scores)
  mixed = MatMul(shares, v)
  rows = Transpose<perm = [0, 2, 1, 3]>(mixed)
  self = Reshape(rows, flat)
  doubled = Add(self, self)
  cross_rows = Reshape(doubled, split)
  cross_q = Transpose<perm = [0, 2, 1, 3]>(cross_rows)
  cross_kt = Transpose<perm = [0, 1, 3, 2]>(cross_k)
  cross_scores = MatMul(cross_q, cross_kt)
  cross_shares = Softmax<axis = -1>(cross_scores)
  cross_mixed = MatMul(cross_shares, cross_v)
  cross_swapped = Transpose<perm = [0, 2, 1, 3]>(cross_mixed)
  cross = Reshape(cross_swapped, flat)
  y = Sub(cross, doubled)
}}
"""

# Two heads of queries share one of keys: their rows are one matrix.
GROUPED = """
<ir_version: 10, opset_import: ["" : 20]>
attention (float[1, {queries}, K, {size}] q, float[1, {heads}, M, {size}] k,
  float[1, {heads}, M, {size}] v) => (float[1, K, {width}] y)
<int64[4] stacked = {{1, {heads}, -1, {size}}}, int64[4] apart = {{1, {queries}, -1, {size}}},
 int64[3] flat = {{1, -1, {width}}}>
{{
  rows = Reshape(q, stacked)
  kt = Transpose<perm = [0, 1, 3, 2]>(k)
  scores = MatMul(rows, kt)
  shares = Softmax<axis = -1>(scores)
  mixed = MatMul(shares, v)
  by_query = Reshape(mixed, apart)
  swapped = Transpose<perm = [0, 2, 1, 3]>(by_query)
  y = Reshape(swapped, flat)
}}
"""


def make(heads, size, plain=PLAIN, group=1):
    queries = heads * group
    text = plain.format(heads=heads, size=size, queries=queries, width=queries * size)
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), strict_mode=True)
    return ir.from_proto(proto)


def run(model, inputs):
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 5),
    size=st.sampled_from([8, 24, 32, 64]),
    rows=st.integers(1, 40),
    keys=st.integers(1, 90),
    text=st.integers(1, 12),
)
def test_fused_attention_gives_what_the_plain_form_gives(heads, size, rows, keys, text):
    draw = np.random.default_rng(rows)
    counts = {"q": rows, "k": keys, "v": keys, "cross_k": text, "cross_v": text}
    inputs = {
        name: draw.normal(size=(1, heads, count, size)).astype(np.float32)
        for name, count in counts.items()
    }
    for name in (
        "k",
        "cross_k",
    ):  # scores of a size that attention has, or float32 alone is 1e-5 off
        inputs[name] *= np.float32(size**-0.5)
    plain = make(heads, size)
    got, expected = run(fuse_attention(plain, heads), inputs), run(plain, inputs)
    assert got.shape == expected.shape == (1, rows, heads * size)
    assert np.abs(got - expected).max() <= 1e-5


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 4),
    group=st.integers(1, 3),
    size=st.sampled_from([8, 32]),
    rows=st.integers(1, 20),
    keys=st.integers(1, 40),
)
def test_attention_of_grouped_heads_is_laid_out_as_before(heads, group, size, rows, keys):
    draw = np.random.default_rng(rows)
    counts = {"q": (heads * group, rows), "k": (heads, keys), "v": (heads, keys)}
    inputs = {
        name: draw.normal(size=(1, *count, size)).astype(np.float32)
        for name, count in counts.items()
    }
    inputs["k"] *= np.float32(size**-0.5)
    plain = make(heads, size, GROUPED, group)
    fused = fuse_attention(plain, heads)
    assert "MultiHeadAttention" in [node.op_type for node in fused.graph]
    got, expected = run(fused, inputs), run(plain, inputs)
    assert got.shape == expected.shape == (1, rows, heads * group * size)
    assert np.abs(got - expected).max() <= 1e-5


def test_nothing_but_attention_is_changed():
    plain = make(heads=2, size=8)
    before = ir.to_proto(plain).SerializeToString()
    fused = fuse_attention(plain, 2)
    assert ir.to_proto(plain).SerializeToString() == before
    assert [value.name for value in (*fused.graph.inputs, *fused.graph.outputs)] == [
        value.name for value in (*plain.graph.inputs, *plain.graph.outputs)
    ]
    flattened = ["Transpose", "Reshape"] * 3 + ["MultiHeadAttention"]
    assert [node.op_type for node in fused.graph] == [
        *("Mul", *flattened, "Add", "Reshape", "Transpose", *flattened, "Sub")
    ]
    for node in fused.graph:
        assert node.domain == (CONTRIB if node.op_type == "MultiHeadAttention" else "")
    assert fused.opset_imports == {"": 20, CONTRIB: 1}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "shares = Softmax<axis = -1>(scores)",
            "masked = Add(scores, half)\n  shares = Softmax<axis = -1>(masked)",
            "Softmax of attention: expected MatMul beside it, got Add. ",
        ),
        (
            "scores = MatMul(scaled, kt)",
            "ready = Identity(kt)\n  scores = MatMul(scaled, ready)",
            "MatMul of attention: expected Transpose beside it, got Identity. ",
        ),
        (
            "mixed = MatMul(shares, v)",
            "scored = Mul(shares, half)\n  mixed = MatMul(scored, v)",
            "Softmax of attention: expected MatMul beside it, got Mul. ",
        ),
        (
            "doubled = Add(self, self)",
            "again = MatMul(shares, v)\n  doubled = Add(self, self)",
            "Softmax of attention: expected MatMul beside it, got nothing. ",
        ),
        (
            "self = Reshape(rows, flat)",
            "ready = Identity(rows)\n  self = Reshape(ready, flat)",
            "Transpose of attention: expected Reshape beside it, got Identity. ",
        ),
    ],
    ids=["mask", "keys-not-transposed", "scaled-weights", "weights-read-twice", "heads-not-joined"],
)
def test_other_patterns_are_refused(old, new, message):
    text = PLAIN.format(heads=2, size=8, width=16)
    assert old in text
    model = ir.from_onnx_text(text.replace(old, new))
    with pytest.raises(ValueError) as error:
        fuse_attention(model, 2)
    way_out = "Write attention as MatMul, Softmax, MatMul, Transpose, Reshape."
    assert str(error.value) == message + way_out
