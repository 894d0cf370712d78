"""Export and run the published sizes with made-up weights; print time, memory and bytes.

Nothing of 28 GB lies on the disk beforehand: each tensor is drawn when it is asked for. Every step
is a process of its own, so that its peak is its own: `anonymous` is memory that the process
allocated, sampled every 20 ms; mapped files, which the system can drop at any time, are apart.

    scripts/real_sizes.py             all steps; needs about 35 GB of disk and an hour
    scripts/real_sizes.py run-1.3b    one of them
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from peak_memory import PeakMemory

if TYPE_CHECKING:
    from mc_export.checkpoint import Checkpoint

LATENT_HW = (544 // 8, 960 // 8)
CHUNK_FRAMES = 5
WINDOW_CHUNKS = 5
TEXT_TOKENS = 512
THREADS = 2
MAGI_LAYERS = 27  # of 48: what stays below 30 GB
INTERVAL = 0.02  # seconds between samples of memory


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def export(model: str, whole: bool, target: Path) -> None:
    """Export a published size in bfloat16, parity included; with text encoder and VAE if whole."""
    import torch

    from mc_engines.published import PUBLISHED, UMT5_XXL, WAN21_VAE
    from mc_export.checkpoint import Checkpoint, Part
    from mc_export.random_source import RandomSource
    from mc_export.skyreels_components import transformer_tensors
    from mc_export.t5 import text_encoder_tensors
    from mc_export.wan_vae_components import vae_tensors

    torch.set_num_threads(THREADS)

    def part(config: dict[str, object], names: Callable[..., dict[str, tuple[int, ...]]]) -> Part:
        return Part(config, RandomSource(names(config), torch.bfloat16, seed=0))

    transformer = part(dict(PUBLISHED[model].transformer), transformer_tensors)
    text_encoder = part(dict(UMT5_XXL), text_encoder_tensors) if whole else None
    vae = part(dict(WAN21_VAE), vae_tensors) if whole else None
    checkpoint = Checkpoint(Path(model), transformer, text_encoder, vae, None, None)
    measure_export(
        f"{model}{' with umT5-xxl and the VAE' if whole else ', transformer'}", checkpoint, target
    )


def export_magi(layers: int, target: Path) -> None:
    """Export the first layers of MAGI-1 24B's transformer in bfloat16, parity included."""
    import torch

    from mc_engines.published import MAGI
    from mc_export.checkpoint import Checkpoint, Part
    from mc_export.magi_config import transformer_tensors
    from mc_export.random_source import RandomSource

    torch.set_num_threads(THREADS)
    published = MAGI["magi-24b"]
    config = dict(published.transformer) | {"num_layers": layers}
    source = RandomSource(transformer_tensors(config), torch.bfloat16, seed=0)
    size = {"video_size_h": published.height, "video_size_w": published.width}
    settings = dict(published.settings or {}) | size | {"num_frames": published.base_num_frames}
    checkpoint = Checkpoint(
        Path("magi-24b"), Part(config, source), None, None, None, settings, family="magi"
    )
    measure_export(f"magi-24b, {layers} of 48 layers", checkpoint, target)


def measure_export(title: str, checkpoint: "Checkpoint", target: Path) -> None:
    """Export, and print time, memory, bytes, and how much of their tolerance outputs used up."""
    from mc_export.export_bundle import export_bundle

    with PeakMemory(INTERVAL) as memory:
        rows = export_bundle(checkpoint, target, overwrite=True)
    print(f"export {title}: {memory}, ")
    print(f"  {folder_bytes(target) / 1e9:.2f} GB written, {len(rows)} outputs within", end="")
    print(f" {max(row.share for row in rows):.0%} of their tolerance", flush=True)


def run(bundle: Path) -> None:
    """Run the blocks of DF-1.3B at 540P: all layers at the first chunk, one layer at the last."""
    from mc_runtime.pipeline import VideoPipeline

    transformer = VideoPipeline.from_bundle(bundle, THREADS).transformer
    tokens = CHUNK_FRAMES * (LATENT_HW[0] // 2) * (LATENT_HW[1] // 2)
    layers = transformer.config.layers
    for share in (1.0, 0.25):
        run_chunk(transformer, layers, 0, tokens, share)
    for share in (1.0, 0.25):
        run_chunk(transformer, 1, WINDOW_CHUNKS - 1, tokens, share)


def run_chunk(transformer: object, layers: int, chunk: int, tokens: int, share: float) -> None:
    """Time one pass of the first layers over a share of a chunk's tokens."""
    from dataclasses import replace

    from mc_runtime.transformer import KeyCache, Transformer

    assert isinstance(transformer, Transformer)
    config = replace(transformer.config, layers=layers)
    part = replace(transformer, config=config)
    rng = np.random.default_rng(0)
    text = {
        name: rng.standard_normal((1, config.heads, TEXT_TOKENS, config.head_dim), np.float32)
        for name in ("cross_k", "cross_v")
    }
    grid = (LATENT_HW[0] // 2, LATENT_HW[1] // 2)
    angles = config.rope.tables(CHUNK_FRAMES, *grid, first_frame=chunk * CHUNK_FRAMES)
    x = rng.standard_normal((1, tokens, config.dim), np.float32)
    rows = np.arange(0, tokens, round(1 / share))
    modulation = rng.standard_normal((1, 6, config.dim), np.float32) * np.float32(0.1)
    with PeakMemory(INTERVAL) as memory:
        cache = KeyCache(config, (chunk + 1) * tokens)
        y = part.recompute(x, rows, modulation, angles, [text] * layers, cache, chunk * tokens)
    assert np.isfinite(y).all()
    print(
        f"run {layers:2d} layers, {len(rows):6,} tokens, {(chunk + 1) * tokens:6,} keys: {memory}"
    )
    sys.stdout.flush()


def main() -> None:
    """Run one step here, or each in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = ("export-1.3b", "run-1.3b", "export-14b", "export-magi-24b")
    parser.add_argument("step", nargs="?", choices=steps)
    parser.add_argument("--folder", type=Path, default=Path("out/real-sizes"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    small, large = arguments.folder / "1.3b.bundle", arguments.folder / "14b.bundle"
    magi = arguments.folder / "magi-24b.bundle"
    if arguments.step == "export-1.3b":
        export("skyreels-df-1.3b-540p", True, small)
    elif arguments.step == "run-1.3b":
        run(small)
    elif arguments.step == "export-14b":
        export("skyreels-df-14b-540p", False, large)
    elif arguments.step == "export-magi-24b":
        export_magi(MAGI_LAYERS, magi)
    else:
        for step in steps:
            command = [sys.executable, __file__, step, "--folder", str(arguments.folder)]
            subprocess.run(command, check=True)
            done = {"run-1.3b": small, "export-14b": large, "export-magi-24b": magi}.get(step)
            if done is not None:
                shutil.rmtree(done)


if __name__ == "__main__":
    main()
