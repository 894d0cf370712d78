"""Running engines on a GPU: memory, streams, kernels, weights, and the engines themselves."""

__all__: list[str] = []
