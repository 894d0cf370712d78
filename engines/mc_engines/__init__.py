"""What an engine is, where it lives on disk, and how it is run."""

__all__: list[str] = []
