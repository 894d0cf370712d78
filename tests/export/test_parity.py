"""What `compare_outputs` measures, and that no wrong graph or weight file gets through."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mc_engines.errors import CheckpointError, ParityError
from mc_export import write_component as module
from mc_export.component import ComponentSource
from mc_export.islands import narrow
from mc_export.layers import Linear, RmsNorm
from mc_export.magi import Head
from mc_export.onnx_export import export_component
from mc_export.parity import (
    TOLERANCES,
    Comparison,
    compare_outputs,
    hold_to_own_error,
    require_parity,
)
from mc_export.passes.set_precision import set_precision
from mc_export.passes.store_weights import StoredWeights
from mc_export.write_component import write_component


def compare(got, expected, form="fp32"):
    got, expected = (np.array(values, np.float32) for values in (got, expected))
    (row,) = compare_outputs("head", form, None, {"y": got}, {"y": expected})
    return row


def test_errors_are_those_of_their_names():
    got, expected = [[1.0, 2.0], [3.0, -4.0]], [[1.0, 2.5], [3.0, -8.0]]
    row = compare(got, expected)
    assert (row.component, row.form, row.layer, row.output) == ("head", "fp32", None, "y")
    assert (row.max_abs, row.mean_abs, row.scale) == (4, 4.5 / 4, 8)
    lengths = (1 + 4 + 9 + 16) ** 0.5 * (1 + 6.25 + 9 + 64) ** 0.5
    assert row.cosine == pytest.approx((1 + 5 + 9 + 32) / lengths)


@pytest.mark.parametrize(
    ("got", "expected", "cosine"),
    [([1, 2], [2, 4], 1), ([1, 0], [0, 1], 0), ([1], [-3], -1), ([0], [0], 1), ([0], [1], 0)],
)
def test_cosine(got, expected, cosine):
    assert compare(got, expected).cosine == pytest.approx(cosine)


@pytest.mark.parametrize(
    ("form", "tolerance"), [("fp32", 1e-4), ("fp32-mha", 1e-4), ("fp16", 5e-3), ("bf16", 4e-2)]
)
def test_an_error_may_be_as_large_as_its_tolerance_relative_to_the_output(form, tolerance):
    for scale in (0.01, 1.0, 50.0):
        allowed = tolerance * max(1.0, scale)
        assert compare([scale + 0.99 * allowed], [scale], form).passes
        assert not compare([scale + 1.02 * allowed], [scale], form).passes
    (deep,) = compare_outputs("vae", form, 0, {"y": np.ones(1)}, {"y": np.ones(1)}, depth=4)
    assert deep.tolerance == (4 * tolerance if form == "bf16" else tolerance)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["got", "expected", "both"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_and_infinity_never_pass(bad, where):
    got = [1.0, bad if where != "expected" else 2.0]
    expected = [1.0, bad if where != "got" else 2.0]
    assert not compare(got, expected, "bf16").passes


ROW = Comparison("block", "fp16", 29, "y", 0.25, 0.1, 0.9, 8.0, 5e-3)


def test_the_message_names_the_first_that_does_not_pass():
    passing = dataclasses.replace(ROW, max_abs=0.04)
    assert passing.passes
    require_parity([passing, passing])
    with pytest.raises(ParityError) as error:
        require_parity([passing, ROW, dataclasses.replace(ROW, output="k_new")])
    assert str(error.value) == (
        "block layer 29, fp16, output 'y': expected an error of at most 0.005 relative to 8, "
        "got 0.25. The graph does not compute what the model computes: do not use it."
    )
    with pytest.raises(ParityError, match=r"^head, bf16, output 'y': expected .*, got nan\. "):
        require_parity([compare([np.nan], [1.0], "bf16")])


# ---- a component, exported once for both ways of carrying weights


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = Linear(16, 32)
        self.norm = RmsNorm(32, 1e-6)

    def forward(self, x):
        hidden = self.up(x)
        return self.norm(hidden), hidden


def draw_weights(seed):
    torch.manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in Small().named_parameters()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def make_source(layered):
    small = Small().eval().requires_grad_(False)
    layers = ()
    if layered:
        layers = tuple((lambda seed=seed: draw_weights(seed)) for seed in range(3))
    else:
        small.load_state_dict(draw_weights(0))
    sample = {"x": torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))}
    return ComponentSource("small", small, sample, {"x": {1: "K"}}, ("y", "hidden"), layers)


@pytest.fixture(scope="module", params=[False, True], ids=["baked", "layers"])
def exported(request):
    source = make_source(request.param)
    return request.param, export_component(source)


@pytest.fixture
def source(exported, monkeypatch):
    """A component whose export takes no time; `monkeypatch` may break what comes after."""
    layered, model = exported

    def export(source):
        copy = model.clone()
        if not layered:  # the graph was traced with other values of the weights
            for name, parameter in source.module.named_parameters():
                value = copy.graph.initializers[f"component.{name}"]
                value.const_value = ir.tensor(parameter.numpy(), name=value.name)
        return copy

    monkeypatch.setattr(module, "export_component", export)
    return make_source(layered)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_form_passes_however_the_weights_are_stored(source, tmp_path, dtype):
    _, rows = write_component(source, tmp_path, module.STORED_TYPES[dtype], dtype)
    require_parity(rows)
    layers = [0, 2] if source.layers else [None]
    assert {(row.form, row.layer, row.output) for row in rows} == {
        (form, layer, output)
        for form in ("fp32", "fp16", "bf16")
        for layer in layers
        for output in ("y", "hidden")
    }


def refusal(source, folder):
    """The message about the first output that does not pass."""
    _, rows = write_component(source, folder, None, "fp32")
    with pytest.raises(ParityError) as error:
        require_parity(rows)
    return str(error.value)


@pytest.mark.parametrize("form", ["fp32", "fp16", "bf16"])
def test_a_graph_that_computes_something_else_is_refused(source, tmp_path, monkeypatch, form):
    def break_one(model, precision, *rest):
        copy = set_precision(model, precision, *rest)
        if precision == form:
            next(node for node in copy.graph if node.op_type == "Add").op_type = "Sub"
        return copy

    monkeypatch.setattr(module, "set_precision", break_one)
    where = "small layer 0" if source.layers else "small"
    assert refusal(source, tmp_path).startswith(f"{where}, {form}, output 'y': expected an error ")


def test_a_wrong_value_in_a_file_of_weights_is_refused(source, tmp_path, monkeypatch):
    def save_wrong(tensors, path):
        if "02" in path.name:
            tensors["up.weight"][3, 4] += 0.1
        save_file(tensors, path)

    class WrongWeights(StoredWeights):
        def __init__(self, model, path, dtype):
            super().__init__(model, path, dtype)
            values = np.fromfile(path, np.float32)
            values[100] += 0.1
            values.tofile(path)

    if source.layers:
        monkeypatch.setattr(module, "save_file", save_wrong)
    else:
        monkeypatch.setattr(module, "StoredWeights", WrongWeights)
    where = "small layer 2" if source.layers else "small"
    assert refusal(source, tmp_path).startswith(f"{where}, fp32, output 'y': expected an error ")


def test_a_graph_that_gives_nan_is_refused(source, tmp_path):
    source.inputs["x"][0, 0, 0] = torch.nan  # on both sides: torch's result is no better
    where = "small layer 0" if source.layers else "small"
    assert refusal(source, tmp_path) == (
        f"{where}, fp32, output 'y': expected an error of at most 0.0001 relative to 1, got nan. "
        "The graph does not compute what the model computes: do not use it."
    )


def test_weights_that_do_not_fit_float16_are_refused(source, tmp_path):
    with torch.no_grad():
        if source.layers:
            weights = draw_weights(0) | {"up.bias": torch.tensor([7e4, *[0.0] * 31])}
            source = dataclasses.replace(source, layers=(source.layers[0], lambda: weights))
        else:
            source.module.up.bias[0] = 7e4
    where = "weights/small.01.safetensors" if source.layers else "small"
    with pytest.raises(CheckpointError) as error:
        write_component(source, tmp_path, torch.float16, "fp16")
    assert str(error.value) == (
        f"{where}: weight 'up.bias': expected values that fit float16, got 70000. "
        "Export with --dtype bf16 or fp32."
    )


def test_what_the_proof_needs_is_gone_afterwards(source, tmp_path):
    spec, _ = write_component(source, tmp_path, None, "bf16")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    graphs = {f"onnx/small.{form}.onnx" for form in spec.graphs}
    kept = set(spec.weight_files) if source.layers else {"onnx/small.onnx.data"}
    assert files == {"onnx", *graphs, *kept, *(["weights"] if source.layers else [])}


# ---- models that are no good in 16 bits


class Cancelling(nn.Module):
    """Loses all but the leading bits of x in 16-bit arithmetic, as some trained models do."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(500.0), requires_grad=False)

    def forward(self, x):
        return (x + self.offset).abs() - self.offset


def test_a_model_that_is_no_good_in_16_bits_may_be_so_in_its_graphs(tmp_path):
    x = torch.linspace(-1, 1, 64).reshape(1, 64)
    source = ComponentSource("bad", Cancelling().eval(), {"x": x}, {"x": {1: "n"}}, ("y",))
    _, rows = write_component(source, tmp_path, None, "fp32")
    require_parity(rows)
    by_form = {row.form: row for row in rows}
    assert by_form["fp32"].tolerance == TOLERANCES["fp32"]
    bf16 = by_form["bf16"]  # whose numbers from 256 to 512 are 2 apart
    assert bf16.max_abs == pytest.approx(1, rel=0.1)
    assert bf16.tolerance == pytest.approx(2 * bf16.max_abs, rel=1e-6)
    assert bf16.own_error == bf16.max_abs and by_form["fp16"].own_error is None
    assert by_form["fp16"].tolerance == TOLERANCES["fp16"], "ONNX Runtime computes it in float32"


@pytest.mark.parametrize("own", [np.nan, np.inf])
def test_own_errors_that_are_not_finite_excuse_nothing(own):
    row = compare([1.5], [1.0], "bf16")
    (same,) = hold(row, own)
    assert same == row and not same.passes


def hold(row, narrowed):
    """As if torch computed `narrowed` in the type of the row, and 1 in float32."""
    return hold_to_own_error([row], {"y": np.array([narrowed])}, {"y": np.array([1.0])})


@pytest.mark.parametrize(
    ("narrowed", "tolerance"), [(1.01, 0.02), (1.2, 0.4), (1.0, 2**-8), (1.001, 2**-8)]
)
def test_bf16_may_err_by_twice_what_torch_errs_and_by_a_rounding(narrowed, tolerance):
    (row,) = hold(compare([1.0], [1.0], "bf16"), narrowed)
    assert row.tolerance == pytest.approx(tolerance) and row.own_error is None
    for error, passes in ((0.99 * tolerance, True), (1.02 * tolerance, False)):
        (row,) = hold(compare([1 + error], [1.0], "bf16"), narrowed)
        assert row.passes is passes


def test_what_is_rough_in_16_bits_is_told_from_what_is_not():
    """Above the usual error of the type, and excused by the model's own."""
    for form, usual in (("bf16", 0.04), ("fp16", 0.005)):
        (row,) = hold(compare([1 + 1.1 * usual], [1.0], form), 1 + usual)
        assert row.passes and row.own_error == pytest.approx(usual)
        (row,) = hold(compare([1 + 0.9 * usual], [1.0], form), 1 + usual)
        assert row.passes and row.own_error is None


def test_fp16_that_passes_keeps_its_tolerance():
    row = compare([1.0], [1.0], "fp16")
    assert hold(row, 3.0) == [row]


def test_islands_stay_float32_in_a_narrowed_module():
    small = make_source(layered=False).module
    x = torch.randn(3, 16)
    narrowed = narrow(small, torch.bfloat16)
    y, hidden = narrowed(x.bfloat16())
    weights = draw_weights(0)
    expected = x.bfloat16() @ weights["up.weight"].bfloat16() + weights["up.bias"].bfloat16()
    torch.testing.assert_close(hidden, expected)
    wide = hidden.float()
    norm = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights["norm.weight"]
    torch.testing.assert_close(y, norm.bfloat16(), rtol=2**-8, atol=0)
    assert small.up.weight.dtype == torch.float32, "the original is left alone"


def test_what_lies_inside_an_island_belongs_to_it():
    """Also a module that is none, and an island: nothing is rounded on the way."""
    torch.manual_seed(0)
    head = Head(dim=16, patch_channels=5, epsilon=1e-6).eval()
    nn.init.normal_(head.project.weight)
    x = torch.randn(1, 3, 16)
    narrowed = narrow(head, torch.bfloat16)
    assert narrowed.project.weight.dtype == torch.float32
    with torch.no_grad():
        expected = head(x.bfloat16().float())
        torch.testing.assert_close(narrowed(x.bfloat16()), expected.bfloat16(), rtol=0, atol=0)
