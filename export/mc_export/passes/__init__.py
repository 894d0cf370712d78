"""Passes over ONNX graphs: one file each, from a model to a new model."""

__all__: list[str] = []
