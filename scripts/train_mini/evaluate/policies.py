"""The table of cache policies, by kind of scene, and over a long video chunk by chunk.

Both are runs of `mc-bench`; its reports stay in the folder of the results.
"""

__all__ = ["LONG_FRAMES", "POLICIES", "measure_long", "measure_policies", "render_policies"]

import hashlib
import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.train_mini.bundle import BUNDLE
from scripts.train_mini.forcing import CHUNK
from scripts.train_mini.job import OUT, THREADS
from scripts.train_mini.presets import PRESETS

from mc_export.fetch import PACKAGED
from mc_runtime import VideoPipeline

from .records import results_folder
from .scenes import Kind, held_out_scenes

POLICIES = ("none", *PRESETS)
_KINDS: tuple[Kind, ...] = ("static", "slow", "fast", "pan", "cut")
_PROMPTS = 4  # of each kind
_ROUNDS = 1  # of each prompt: that there are several is what steadies the times
_LONG_CHUNKS = 20
LONG_FRAMES = 4 * (CHUNK * _LONG_CHUNKS - 1) + 1
_LPIPS = OUT.parent / "lpips.onnx"  # where scripts/make_lpips.py made it
_SCORES = tuple(
    (region, score) for region in ("whole", "moving") for score in ("psnr", "ssim", "lpips")
)
_HEADS = (
    *("wall, diffusers", "wall, none", "FLOPs, diffusers", "FLOPs, none", "reused"),
    *(f"{score}, {region}" for region, score in _SCORES),
)


def measure_policies(pipeline: VideoPipeline) -> str:
    """Return the table: speed and fidelity of each policy on prompts of each kind, and of all."""
    diffusers = ["--baseline", "diffusers", "--checkpoint", str(PACKAGED)]
    reports = {
        kind: _bench(pipeline, f"policies-{kind}", held_out_scenes(_PROMPTS, kind), diffusers)
        for kind in _KINDS
    }
    settings = next(iter(reports.values()))["settings"]
    return "\n".join(
        (
            f"policies, {_PROMPTS} held-out prompts a kind, all from the noise of seed "
            f"{settings['seed']}, {settings['num_inference_steps']} steps, "
            f"{settings['num_frames']} frames; fidelity against none:",
            *render_policies(reports),
            *_caveats(reports.values()),
        )
    )


def measure_long(pipeline: VideoPipeline) -> str:
    """Return the PSNR of every chunk of a video of 20 chunks, whole frame and moving region."""
    scenes = held_out_scenes(1, "slow")
    report = _bench(pipeline, "long", scenes, ["--num-frames", str(LONG_FRAMES)])
    policies = {policy["policy"]: policy for policy in report["policies"][1:]}
    lines = [
        f"'{scenes[0].caption()}', {_LONG_CHUNKS} chunks: PSNR in dB, whole frame / moving region",
        f"{'chunk':>8}" + "".join(f"{name:>26}" for name in policies),
    ]
    for chunk in range(_LONG_CHUNKS):
        cells = [_chunk_cell(policy, chunk) for policy in policies.values()]
        lines.append(f"{chunk + 1:>8}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join([*lines, *render_policies({"long": report}), *_caveats([report])])


def _bench(
    pipeline: VideoPipeline, name: str, scenes: Sequence[Any], arguments: Sequence[str]
) -> dict[str, Any]:
    """Run `mc-bench` on the captions of scenes, unless its report is on file, and return that."""
    captions = "".join(f"{scene.caption()}\n" for scene in scenes)
    lpips = ["--lpips", str(_LPIPS)] if _LPIPS.exists() else []
    settings = ["--rounds", str(_ROUNDS), *lpips, *arguments]
    asked = [captions, *POLICIES, *settings, dict(pipeline.bundle.manifest.presets)]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    output = results_folder(pipeline) / f"{name}-{digest}.json"
    if not output.exists():
        prompts = output.with_suffix(".txt")
        prompts.write_text(captions)
        command = ["mc-bench", "run", str(BUNDLE), "--policies", ",".join(POLICIES)]
        command += ["--prompts", str(prompts), "-o", str(output), "--threads", str(THREADS)]
        subprocess.run([*command, *settings], check=True, stdout=subprocess.DEVNULL)
    report: dict[str, Any] = json.loads(output.read_text())
    return report


def render_policies(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lay reports of `mc-bench` out as a table, a block per report and one of all their means.

    Times and FLOPs are how many times diffusers' way, or none, takes what the policy takes.
    """
    lines = [f"{'':>8}{'':>24}" + "".join(f"{head:>18}" for head in _HEADS)]
    rows: dict[str, list[list[float | None]]] = {}
    for kind, report in reports.items():
        for policy in report["policies"]:
            values = _policy_values(report, policy)
            rows.setdefault(policy["policy"], []).append(values)
            lines.append(f"{kind:>8}{policy['policy']:>24}{_cells(values)}")
    if len(reports) > 1:
        for name, each in rows.items():
            means = [_mean(column) for column in zip(*each, strict=True)]
            lines.append(f"{'all':>8}{name:>24}{_cells(means)}")
    return lines


def _policy_values(report: Mapping[str, Any], policy: Mapping[str, Any]) -> list[float | None]:
    mean, diffusers = policy["fidelity"]["mean"], report["diffusers"]
    return [
        None if diffusers is None else policy["speedup"] * diffusers["none_speedup"],
        policy["speedup"],
        policy["flops_ratio"]["every_chunk_every_row"],
        policy["flops_ratio"]["chunk_causal"],
        policy["reuse_ratio"],
        *(mean[region][score] for region, score in _SCORES),
    ]


def _mean(column: Sequence[float | None]) -> float | None:
    known = [value for value in column if value is not None]
    return statistics.fmean(known) if known else None


def _cells(values: Sequence[float | None]) -> str:
    return "".join(f"{'-' if value is None else f'{value:.3g}':>18}" for value in values)


def _chunk_cell(policy: Mapping[str, Any], chunk: int) -> str:
    (prompt,) = policy["fidelity"]["prompts"]
    regions = prompt["chunks"][chunk]
    return " / ".join(_psnr_cell(regions[name]) for name in ("whole", "moving"))


def _psnr_cell(scores: Mapping[str, Any]) -> str:
    if not scores["frames"]:
        return "still"
    return "same" if scores["psnr"] is None else f"{scores['psnr']:.1f}"


def _caveats(reports: Any) -> list[str]:
    """What a reader has to know of the numbers, each once."""
    return list(dict.fromkeys(line for report in reports for line in report["caveats"]))
