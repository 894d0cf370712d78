"""The plan of an export and of a run as a table: what `mc-export --dry-run` prints.

Neighbours: `size_plan` reckons; a family's adapter says which lines are its own.
"""

__all__ = ["render_components", "render_plan", "render_runs"]

from collections.abc import Collection

import torch

from mc_engines.run_sizes import RunSizes
from mc_export.size_plan import ComponentSize, SizePlan, estimate_export

_RUN_ROWS = {
    "KV cache, one branch": "kv_per_branch",
    "KV cache, all branches": "kv",
    "text keys and values": "context",
    "kept for reuse": "residual",
    "resident weights": "weights",
    "passes with plain attention": "pass_plain",
    "  its scores": "scores",
    "passes with fused attention": "pass_fused",
    "  its q, k, v": "qkv",
    "  its feed-forward": "ffn",
    "decoding": "decode",
    "peak": "peak",
}
_UNKNOWN = "not known"


def render_plan(plan: SizePlan) -> str:
    """Write the plan as a table.

    Args:
        plan: What `plan_sizes` gave.

    Returns:
        Lines of plain text: the bundle's components, the export, a run on the CPU and on a device.
    """
    height, width, frames = plan.video
    video = (
        f"{height} x {width} pixels, {frames} frames a window, {plan.chunk_tokens:,} tokens a "
        f"chunk, {plan.window_tokens:,} a window"
    )
    components = render_components(plan.components, plan.dtype)
    return "\n".join([*components, "", video, *render_runs(plan.cpu, plan.device)])


def render_runs(cpu: RunSizes, device: RunSizes, unknown: Collection[str] = ()) -> list[str]:
    """Write what a run holds on the CPU and on a device.

    Args:
        cpu: A run in float32 in ONNX Runtime.
        device: A run in 16 bit.
        unknown: Fields of `RunSizes` that are not known of the CPU.

    Returns:
        Lines of plain text.
    """

    def tell(sizes: RunSizes, row: str) -> str:
        return f"{getattr(sizes, row) / 1e9:.3f}"

    return [
        f"{'run (GB)':<40}{'CPU, float32':>14}{'device, 16 bit':>16}",
        *(
            f"{label:<40}{_UNKNOWN if row in unknown else tell(cpu, row):>14}"
            f"{tell(device, row):>16}"
            for label, row in _RUN_ROWS.items()
        ),
    ]


def render_components(components: tuple[ComponentSize, ...], dtype: torch.dtype) -> list[str]:
    """Write the table of a bundle's components, and of what their export takes.

    Args:
        components: What `plan_sizes` or `plan_components` counted.
        dtype: Weights are stored in it.

    Returns:
        Lines of plain text.
    """
    stored = str(dtype).removeprefix("torch.")
    bundle = sum(component.bytes for component in components)
    peak = estimate_export(components, dtype.itemsize)
    return [
        f"{'component':<24}{'layers':>8}{'parameters':>18}{stored + ' (GB)':>18}",
        *(
            f"{c.name:<24}{c.layers:>8}{c.parameters:>18,}{c.bytes / 1e9:>18.3f}"
            for c in components
        ),
        f"{'bundle':<50}{bundle / 1e9:>18.3f}",
        f"{'export, peak (estimate)':<50}{peak / 1e9:>18.3f}",
    ]
