"""From a prompt to a video, on compiled engines and numpy."""

__all__: list[str] = []
