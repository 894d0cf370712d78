"""From the graphs of a bundle to engines of TensorRT-RTX or TensorRT, ahead of time."""

__all__: list[str] = []
