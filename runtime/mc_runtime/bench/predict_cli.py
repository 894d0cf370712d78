"""`mc-bench predict`: what a generation would take on a device that is not here."""

__all__ = ["predict_command"]

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from mc_engines.command import command
from mc_runtime.bench.devices import DEVICES, THIS_CPU
from mc_runtime.bench.memory_plan import DTYPES
from mc_runtime.bench.predict import (
    Efficiency,
    Request,
    choose_dtype,
    predict,
)
from mc_runtime.bench.predicted_model import describe_model
from mc_runtime.bench.tables import print_tables
from mc_runtime.display import open_console
from mc_runtime.flags import FILE, INPUT, choose_options, setting_options
from mc_runtime.output_file import check_output, write_text
from motioncache import DecisionTrace

_PLAIN_WIDTH = 100  # columns where the output is not a terminal
_SHARE = click.FloatRange(0, 1)
_POSITIVE_SHARE = click.FloatRange(0, 1, min_open=True)
_SETTINGS = {
    "num_frames": "Frames of the video.",
    "height": "Pixels.",
    "width": "Pixels.",
    "num_inference_steps": "Denoising steps of every chunk.",
    "guidance_scale": "1 switches guidance off.",
    "ar_step": "Steps a chunk lags behind the one before; 0: all together.",
    "causal_block_size": "Latent frames of a chunk.",
    "base_num_frames": "Frames of a window.",
    "overlap_history": "Frames that a window takes over.",
    "nearly_clean": "Of a distilled MAGI-1: keep the guidance of the oldest chunk by itself.",
}
_PARTS = {
    "weights": "weights",
    "kv_cache": "kv cache",
    "prompt_keys": "prompt keys",
    "residuals": "residuals",
    "activations": "activations",
    "text_encoder": "text encoder, a layer before the keys",
    "vae": "VAE, weights and states",
    "peak": "peak",
    "capacity": "capacity",
}
_HOST_PARTS = {
    "process": "process, interpreter and libraries",
    "sessions": "sessions of ONNX Runtime",
    "graph_weights": "weights inside graphs, cast",
    "weights": "weights of blocks, cast",
    "kv_cache": "kv cache",
    "prompt_keys": "prompt keys",
    "residuals": "residuals",
    "activations": "activations of the transformer",
    "decoder": "activations and states of the decoder",
    "frames": "frames of a chunk",
}
_RUNS = {"policy": "this run", "none": "nothing skipped", "vanilla": "every chunk in every row"}


@command("predict")
@click.argument("model", metavar="BUNDLE|CONFIG")
@click.option("--device", required=True, help=f"One of {', '.join([*DEVICES, THIS_CPU])}.")
@click.option(
    "--dtype",
    type=click.Choice([*DTYPES]),
    help="Of the engines; fp8: weights in FP8 beside bf16. Default: bf16, on a CPU fp32.",
)
@click.option("--trace", type=INPUT, help="Take the decisions of a recorded run, as shares.")
@click.option("--computed", type=_SHARE, help="Share of the tokens that every step computes.")
@click.option(
    "--flops-efficiency",
    type=_POSITIVE_SHARE,
    default=Efficiency.flops,
    show_default=True,
    help="Share of the device's operations that the estimate counts on.",
)
@click.option(
    "--bandwidth-efficiency",
    type=_POSITIVE_SHARE,
    default=Efficiency.bandwidth,
    show_default=True,
    help="Share of its bandwidth, likewise.",
)
@click.option("-o", "--output", type=FILE, help="JSON to write.")
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@setting_options(_SETTINGS)
def predict_command(
    model: str,
    device: str,
    dtype: str | None,
    trace: Path | None,
    computed: float | None,
    flops_efficiency: float,
    bandwidth_efficiency: float,
    output: Path | None,
    overwrite: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Predict time and memory of a generation with BUNDLE, or a published CONFIG, by a roofline."""
    if trace is not None and computed is not None:
        raise click.UsageError("--computed and --trace both say what is computed. Give one.")
    if output is not None:
        check_output(output, overwrite)
    described = describe_model(model)
    report = predict(
        described,
        Request(
            choose_options(described.defaults, settings),
            device,
            dtype or choose_dtype(device),
            computed,
            None if trace is None else DecisionTrace.load(trace),
            Efficiency(flops_efficiency, bandwidth_efficiency),
        ),
    )
    if output is not None:
        write_text(output, json.dumps(report, indent=2) + "\n")
    _print(report, open_console(_PLAIN_WIDTH))


def _print(report: Mapping[str, Any], console: Console) -> None:
    device, settings = report["device"], report["settings"]
    size = f"{settings['num_frames']} frames of {settings['height']} x {settings['width']}"
    console.print(
        f"{report['model']} on {device['title']}, {report['dtype']}: {size}, "
        f"{settings['num_inference_steps']} steps, {report['computed_share']:.0%} of the tokens"
    )
    tables = {
        "time, in seconds": (("", "at least", "estimate", "first chunk"), _time_rows(report)),
        "memory, in GB": (("", "GB"), _memory_rows(report["memory"])),
    }
    print_tables(tables, (*_verdict(report["memory"]), *_notes(report)), console)


def _time_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for run, title in _RUNS.items():
        time = report["time"][run]
        if time is None:
            continue
        first = f"{time['first_chunk']['estimate']:.3g}" if "first_chunk" in time else ""
        total = [f"{time['total'][which]:.3g}" for which in ("bound", "estimate")]
        rows.append([title, *total, first])
    return rows


def _memory_rows(memory: Mapping[str, Any]) -> list[list[str]]:
    if (host := memory["host"]) is not None:
        sizes = {title: host["anonymous"][part] for part, title in _HOST_PARTS.items()}
        sizes["text encoder, a layer before the keys"] = memory["text_encoder"]
        sizes |= {"peak, anonymous": memory["peak"], "capacity": memory["capacity"]}
        sizes["mapped files, beside it"] = sum(host["mapped"].values())
    else:
        sizes = {title: memory[part] for part, title in _PARTS.items()}
    return [
        [title, "not known" if size is None else f"{size / 1e9:.4g}"]
        for title, size in sizes.items()
    ]


def _verdict(memory: Mapping[str, Any]) -> list[str]:
    """Whether it fits, and else what would make it fit."""
    shared = ", which the host shares" if memory["shared_with_host"] else ""
    usable = f"{memory['usable_share']:.0%} of the memory{shared}"
    without = f"without {' and '.join(memory['left_out'])}, whose sizes are not known"
    if memory["fits"]:
        return [f"It fits into {usable}, {without}."]
    if not memory["ways_to_fit"]:
        return [f"It does not fit into {usable}, nor with all changes that were tried."]
    ways = [
        f"It would with {way['change']}: {way['peak'] / 1e9:.4g} GB."
        for way in memory["ways_to_fit"]
    ]
    return [f"It does not fit into {usable}, even {without}.", *ways]


def _notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before believing a number."""
    rates, efficiency = report["rates"], report["efficiency"]
    peak = (
        "The peak is that with engines of all parts; without one, text encoder and VAE run on the "
        "CPU."
    )
    if report["memory"]["host"] is not None:
        peak = "What the process holds was measured; the rest is reckoned, with nothing skipped."
    texts = " + ".join(map(str, report["text_tokens"]))
    return [
        peak,
        report["note"],
        f"Texts: {texts} tokens.",
        f"Rates: {rates['flops'] / 1e12:.4g} TFLOP/s with weights, "
        f"{rates['attention_flops'] / 1e12:.4g} in attention, "
        f"{rates['bandwidth'] / 1e9:.4g} GB/s. Source: {report['device']['source']}.",
        f"The estimate counts on {efficiency['flops']:.0%} of the operations and "
        f"{efficiency['bandwidth']:.0%} of the bandwidth; the bound on all of both.",
    ]
