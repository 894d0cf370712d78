"""From a checkpoint to a bundle of ONNX graphs and weights."""

__all__: list[str] = []
