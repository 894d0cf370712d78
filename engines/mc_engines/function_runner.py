"""A Python function as an engine: for tests, and for backends that are called by a function.

Neighbours: `OnnxRuntimeRunner` keeps the same promises for an ONNX file.
"""

__all__ = ["FunctionRunner"]

from collections.abc import Callable

from mc_engines.errors import EngineError
from mc_engines.runner import Array, Arrays, check_inputs
from mc_engines.specs import GraphSpec


class FunctionRunner:
    """Runs a function, and holds it to the graph it stands for.

    Args:
        graph: The tensors the function takes and gives.
        function: Takes the inputs and the weights by name, gives the outputs by name.

    Attributes:
        graph: The tensors the runner takes and gives.
    """

    def __init__(self, graph: GraphSpec, function: Callable[[Arrays, Arrays], Arrays]) -> None:
        self.graph = graph
        self._function = function

    def run(self, inputs: Arrays, weights: Arrays | None = None) -> dict[str, Array]:
        """Compute the outputs of the graph.

        Args:
            inputs: One array per spec of `graph.inputs`.
            weights: One array per spec of `graph.weights`; None where the graph has none.

        Returns:
            One array per spec of `graph.outputs`, in their order.

        Raises:
            ValueError: A name, dtype or shape of an input is not the one of the spec.
            EngineError: A name, dtype or shape of an output is not.
        """
        check_inputs(self.graph, inputs, weights)
        outputs = self._function(inputs, weights or {})
        try:
            # In the place of the weights, so that a symbol means the same size as in the inputs.
            stated = GraphSpec(self.graph.file, self.graph.inputs, (), weights=self.graph.outputs)
            check_inputs(stated, inputs, outputs)
        except ValueError as error:
            raise EngineError(f"The function gave other outputs than its graph. {error}") from error
        return {spec.name: outputs[spec.name] for spec in self.graph.outputs}
