"""Running a graph in ONNX Runtime, on the CPU if nothing else is said.

Neighbours: `Bundle` says where the graph lies and maps the weights that `run` takes.
"""

__all__ = ["FUSED_ATTENTION_BYTES", "HELD_WEIGHTS_BYTES", "OnnxRuntimeRunner", "open_runner"]

from pathlib import Path
from typing import Any

from mc_engines.bundle import Bundle
from mc_engines.errors import EngineError, McError, require
from mc_engines.onnxruntime_providers import Provider, create_session
from mc_engines.runner import Array, Arrays, check_inputs
from mc_engines.specs import GraphSpec, TensorSpec

# Above this much of attention scores in a pass, the form with fused attention is taken: it is then
# faster, and at 540P the only one that fits in memory; below, the plain form is as fast.
FUSED_ATTENTION_BYTES = 256 * 10**6
# Layer weights that are stored in another dtype are cast once and held, up to this much of float32;
# beyond it, one layer at a time, in every pass. DF-1.3B takes 5 GB, DF-14B 56 GB.
HELD_WEIGHTS_BYTES = 8 * 10**9
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OnnxRuntimeRunner:
    """A graph in ONNX Runtime. A session may be run by several threads at once.

    Contiguous inputs and weights are used where they lie; the outputs are new arrays.

    Args:
        graph: The tensors of the file, as the bundle states them.
        path: The ONNX file; ONNX Runtime maps the `.onnx.data` beside it.
        threads: Threads of one operator; None lets ONNX Runtime take every physical core.
        provider: That runs it.

    Attributes:
        graph: The tensors the runner takes and gives.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: The file cannot be loaded, does not have these tensors, or has bfloat16 ones.
    """

    def __init__(
        self,
        graph: GraphSpec,
        path: Path,
        threads: int | None = None,
        provider: Provider = "cpu",
    ) -> None:
        self.graph = graph
        if any(spec.dtype == "bfloat16" for spec in (*graph.inputs, *graph.weights)):
            raise EngineError(
                f"{graph.file}: expected float32 or float16 on the CPU, got bfloat16, "
                "for which ONNX Runtime has no CPU kernels. Use the form fp32."
            )
        self._session = _load(graph.file, path, threads, provider)
        given = self._session.get_inputs(), self._session.get_outputs()
        for kind, specs, nodes in zip(
            ("inputs", "outputs"),
            ((*graph.inputs, *graph.weights), graph.outputs),
            given,
            strict=True,
        ):
            _check_nodes(graph.file, kind, specs, nodes)
        self._output_names = [spec.name for spec in graph.outputs]

    def run(self, inputs: Arrays, weights: Arrays | None = None) -> dict[str, Array]:
        """Compute the outputs of the graph.

        Args:
            inputs: One array per spec of `graph.inputs`.
            weights: One array per spec of `graph.weights`; None where the graph has none.

        Returns:
            One array per spec of `graph.outputs`.

        Raises:
            ValueError: A name, dtype or shape is not the one of the spec.
            EngineError: ONNX Runtime failed.
        """
        check_inputs(self.graph, inputs, weights)
        try:
            arrays = self._session.run(self._output_names, {**inputs, **(weights or {})})
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            raise EngineError(f"{self.graph.file}: ONNX Runtime: {error}") from error
        return dict(zip(self._output_names, arrays, strict=True))


def open_runner(
    bundle: Bundle,
    component: str,
    form: str = "fp32",
    threads: int | None = None,
    provider: Provider = "cpu",
) -> OnnxRuntimeRunner:
    """Load a graph of a bundle.

    Args:
        bundle: An opened bundle.
        component: Such as `block`.
        form: Such as `fp32`.
        threads: Threads of one operator; None lets ONNX Runtime take every physical core.
        provider: That runs it.

    Returns:
        The runner; weights, where the graph takes any, come from `bundle.layer_weights`.

    Raises:
        BundleError: The bundle has no such graph.
        MissingExtraError: onnxruntime is not installed.
        EngineError: The graph cannot be loaded.
    """
    return OnnxRuntimeRunner(
        bundle.graph(component, form), bundle.graph_path(component, form), threads, provider
    )


def _load(file: str, path: Path, threads: int | None, provider: Provider) -> Any:
    onnxruntime = require("onnxruntime", "cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    # Threads that spin while they wait take the cores that numpy and other sessions need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only: they are raised as well
    try:
        return create_session(path, options, provider)
    except McError:
        raise
    except Exception as error:
        raise EngineError(f"{file}: ONNX Runtime cannot load it: {error}") from error


def _check_nodes(file: str, kind: str, specs: tuple[TensorSpec, ...], nodes: list[Any]) -> None:
    found = {node.name: node for node in nodes}
    expected = {spec.name for spec in specs}
    if expected != set(found):
        raise EngineError(
            f"{file}: expected the {kind} {sorted(expected)}, got {sorted(found)}. "
            "Export the bundle again."
        )
    for spec in specs:
        node = found[spec.name]
        fits = _DTYPES.get(node.type) == spec.dtype and len(node.shape) == len(spec.shape)
        if not fits or any(
            isinstance(size, int) and isinstance(wanted, int) and size != wanted
            for size, wanted in zip(node.shape, spec.shape, strict=True)
        ):
            raise EngineError(
                f"{file}: '{spec.name}': expected {spec.describe()}, got {node.type} "
                f"{node.shape}. Export the bundle again."
            )
