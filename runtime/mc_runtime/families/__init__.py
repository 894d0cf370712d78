"""What distinguishes families of models at run time: data and functions, and nothing else.

A family has a module here, an adapter in the exporter, and rules and presets in `motioncache`.
Everything that is alike (windows, rows, traces, decoding) asks the family that the manifest names.
"""

__all__: list[str] = []
