"""Measure the memory that a run takes on this CPU, and print what is predicted beside it.

Every measurement is a process of its own, so that its peak is its own; anonymous memory and mapped
files are apart. `passes` makes one layer of DF-1.3B and Wan's autoencoder with made-up weights
first, into --folder, if they are not there: minutes, and 0.6 GB.

    scripts/memory_check.py generation mini.bundle          a generation with a bundle
    scripts/memory_check.py passes                          the largest passes of DF-1.3B at 540P
    scripts/memory_check.py passes --height 136 --width 240 --tokens 1020 --chunks 2    smaller ones
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from peak_memory import PeakMemory

from mc_engines.arena import Arena
from mc_engines.block_tape import record_block
from mc_engines.bundle import Bundle
from mc_engines.host_sizes import hold_decoder, takes_fused
from mc_engines.onnxruntime_runner import open_runner
from mc_engines.run_sizes import TEXT_TOKENS, WindowShape
from mc_engines.runner import Array
from mc_engines.specs import GraphSpec
from mc_runtime.bench.host_plan import SESSION_BYTES, measure_process, plan_host
from mc_runtime.bench.predicted_model import describe_model
from mc_runtime.pipeline import VideoPipeline

GOAL = 0.10  # largest relative error
PROMPT = "a big red circle drifts left over sand"
FOLDER = Path("out/real-sizes")
MODEL = "skyreels-df-1.3b-540p"
THREADS = 2
INTERVAL = 0.005  # seconds between samples: a step of a small model is short


@dataclass(frozen=True)
class Check:
    """A measurement beside its prediction, in bytes.

    Attributes:
        name: What was run.
        parts: Anonymous memory as predicted.
        mapped: Of files, as predicted.
        measured: Anonymous and mapped, peaks.
    """

    name: str
    parts: Mapping[str, int]
    mapped: int
    measured: tuple[int, int]

    @property
    def errors(self) -> tuple[float, float]:
        """Relative, of anonymous and mapped memory."""
        anonymous, mapped = self.measured
        return sum(self.parts.values()) / anonymous - 1, self.mapped / mapped - 1

    def __str__(self) -> str:
        predicted = sum(self.parts.values()), self.mapped
        rows = zip(("anonymous", "mapped"), predicted, self.measured, self.errors, strict=True)
        told = ", ".join(
            f"{kind} {reckoned / 1e6:,.1f} predicted, {seen / 1e6:,.1f} measured ({error:+.1%})"
            for kind, reckoned, seen, error in rows
        )
        parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in self.parts.items() if size)
        return f"{self.name}, in MB: {told}\n  {parts}"


def measure(step: str, bundle: Path, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Run a step in a process of its own and return its peaks."""
    command = [sys.executable, __file__, step, str(bundle), "--settings", json.dumps(settings)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr)
    anonymous, mapped = json.loads(result.stdout.splitlines()[-1])
    return anonymous, mapped


def check_generation(bundle: Path, settings: Mapping[str, Any]) -> Check:
    """Generate with a bundle, and predict it."""
    model = describe_model(str(bundle))
    plan = plan_host(model, replace(model.defaults, **settings))
    measured = measure("run-generation", bundle, settings)
    return Check(f"{bundle.name}, {settings}", plan.anonymous, plan.peak_mapped, measured)


def run_generation(bundle: Path, settings: Mapping[str, Any]) -> PeakMemory:
    """Generate from a prompt."""
    with PeakMemory(INTERVAL) as peaks:
        for _ in VideoPipeline.from_bundle(bundle, THREADS).generate(PROMPT, **settings):
            pass
    return peaks


def check_block(bundle: Path, settings: Mapping[str, Any]) -> Check:
    """Run one layer on the last chunk of a window, `runs` times."""
    model = describe_model(str(bundle))
    f, tokens = model.flops, settings["tokens"]
    keys = tokens * settings["chunks"]
    window = WindowShape(1, model.config["transformer"]["heads"], f.dim, f.ffn_dim, tokens, keys)
    fused, arena = takes_fused(window, keys), Arena()
    arena.run(record_block(window, keys, fused), settings["runs"])
    process, libraries = measure_process()
    row, block = 4 * f.dim, 6 * f.dim**2 + 2 * f.dim * f.ffn_dim
    parts = {
        "process": process,
        "sessions": 2 * SESSION_BYTES,
        "weights": 4 * block,
        "kv_cache": 2 * keys * row,
        "prompt_keys": 2 * TEXT_TOKENS * row,
        "input": tokens * row,
        "activations": arena.resident,
    }
    form = "fused" if fused else "plain"
    name = f"block, {tokens} tokens, {keys} keys, {form}, {settings['runs']} runs"
    mapped = libraries + model.stored_bytes * block
    measured = measure("run-block", bundle, {**settings, "fused": fused})
    return Check(name, parts, mapped, measured)


def fill_inputs(graph: GraphSpec, sizes: Mapping[str, int], keys: int) -> dict[str, Array]:
    """Make inputs of a block of given sizes, by their symbols, of which all keys are seen."""
    inputs = {}
    for spec in graph.inputs:
        shape = tuple(each if isinstance(each, int) else sizes[each] for each in spec.shape)
        inputs[spec.name] = np.full(shape, 0.01 if spec.dtype == "float32" else 0, spec.dtype)
    return inputs | {"kv_map": np.arange(keys, dtype=np.int32)}


def run_block(bundle: Path, settings: Mapping[str, Any]) -> PeakMemory:
    """Run it, with keys that have been written."""
    opened = Bundle.open(bundle)
    tokens, keys = settings["tokens"], settings["tokens"] * settings["chunks"]
    sizes = {"K": tokens, "L": tokens, "S": keys, "M": keys, "T": TEXT_TOKENS, "F": 1, "B": 1}
    with PeakMemory(INTERVAL) as peaks:
        forms = [open_runner(opened, "block", form, THREADS) for form in ("fp32", "fp32-mha")]
        weights = opened.layer_weights("block", 0, "fp32")
        runner = forms[settings["fused"]]
        inputs = fill_inputs(runner.graph, sizes, keys)
        for _ in range(settings["runs"]):
            outputs = runner.run(inputs, weights)  # those before are there until then
            assert np.isfinite(outputs["y"]).all()
    return peaks


def check_decoder(bundle: Path, settings: Mapping[str, Any]) -> Check:
    """Decode some latent frames, one after the other."""
    model = describe_model(str(bundle))
    assert model.decoder is not None
    height, width, steps = (settings[name] for name in ("height", "width", "steps"))
    sizes = hold_decoder(model.decoder, height, width, steps, frames=4)
    process, libraries = measure_process()
    files = [bundle / "onnx" / f"vae_decoder_{each}.onnx.data" for each in ("first", "next")]
    stored = sum(file.stat().st_size for file in files)
    parts = {
        "process": process,
        "sessions": 2 * SESSION_BYTES,
        "graph_weights": 4 * stored // model.stored_bytes,
        "decoder": sizes.arenas,
        "frames": sizes.frames // 3,  # neither scaled nor clipped here
    }
    name = f"decoder, {height}x{width} latents, {steps} steps"
    return Check(name, parts, libraries, measure("run-decoder", bundle, settings))


def run_decoder(bundle: Path, settings: Mapping[str, Any]) -> PeakMemory:
    """Decode zeros."""
    with PeakMemory(INTERVAL) as peaks:
        decoder = VideoPipeline.from_bundle(bundle, THREADS).decoder
        shape = 16, settings["steps"], settings["height"], settings["width"]
        for _ in decoder.decode_steps(np.zeros(shape, np.float32)):
            pass
    return peaks


def make_bundle(folder: Path) -> Path:
    """Export one layer of the transformer and the autoencoder, with made-up weights, once."""
    target = folder / "one-layer.bundle"
    if target.exists():
        return target
    import torch

    from mc_engines.published import PUBLISHED, WAN21_VAE
    from mc_export.checkpoint import Checkpoint, Part
    from mc_export.export_bundle import export_bundle
    from mc_export.random_source import RandomSource
    from mc_export.skyreels_components import transformer_tensors
    from mc_export.wan_vae_components import vae_tensors

    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)
    config = dict(PUBLISHED[MODEL].transformer) | {"num_layers": 1}
    parts = [
        Part(each, RandomSource(tensors, torch.bfloat16, seed=0))
        for each, tensors in (
            (config, transformer_tensors(config)),
            (dict(WAN21_VAE), vae_tensors(WAN21_VAE)),
        )
    ]
    export_bundle(Checkpoint(Path(MODEL), parts[0], None, parts[1], None, None), target)
    return target


def check_passes(arguments: argparse.Namespace) -> list[Check]:
    """Run the block, then the decoder, of the sizes that are asked for."""
    bundle = make_bundle(arguments.folder)
    checks = []
    if arguments.tokens:
        block = {name: getattr(arguments, name) for name in ("tokens", "chunks", "runs")}
        checks.append(check_block(bundle, block))
    if arguments.height:
        sides = {"height": arguments.height // 8, "width": arguments.width // 8}
        checks.append(check_decoder(bundle, {**sides, "steps": 1 + arguments.runs}))
    return checks


def main() -> int:
    """Return 0 if every prediction is as close as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs = {"run-generation": run_generation, "run-block": run_block, "run-decoder": run_decoder}
    parser.add_argument("step", choices=["generation", "passes", *runs])
    parser.add_argument("bundle", type=Path, nargs="?", help="of generation")
    parser.add_argument("--settings", type=json.loads, default={}, help="of generation, as JSON")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--tokens", type=int, default=10_200, help="of a chunk; 0: no block")
    parser.add_argument("--chunks", type=int, default=5, help="whose keys are seen")
    parser.add_argument("--height", type=int, default=544, help="pixels; 0: no decoder")
    parser.add_argument("--width", type=int, default=960, help="pixels")
    parser.add_argument("--runs", type=int, default=1, help="of the block, and later steps")
    arguments = parser.parse_args()
    if arguments.step in runs:
        peaks = runs[arguments.step](arguments.bundle, arguments.settings)
        print(json.dumps([peaks.anonymous, peaks.mapped]))
        return 0
    if arguments.step == "generation":
        checks = [check_generation(arguments.bundle, arguments.settings)]
    else:
        checks = check_passes(arguments)
    for check in checks:
        print(check, flush=True)
    return int(any(abs(error) > GOAL for check in checks for error in check.errors))


if __name__ == "__main__":
    raise SystemExit(main())
