"""Cache policies for autoregressive video diffusion: pure functions over explicit state."""

__all__: list[str] = []
