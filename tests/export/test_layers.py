"""Layers as ONNX Runtime computes them."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from mc_export.component import ComponentSource
from mc_export.layers import silu
from mc_export.onnx_export import export_component


class Silu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu(x)


def test_silu_keeps_its_digits_where_it_is_small():
    """The oracle is the formula in float64."""
    x = np.linspace(-40, 40, 8001, dtype=np.float32)
    source = ComponentSource("silu", Silu(), {"x": torch.from_numpy(x)}, {"x": {0: "n"}}, ("y",))
    graph = ir.to_proto(export_component(source)).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x})
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(got, exact, rtol=5e-7)
    (ends,) = session.run(None, {"x": np.array([-500, 500], np.float32)})
    assert ends.tolist() == [0, 500]
