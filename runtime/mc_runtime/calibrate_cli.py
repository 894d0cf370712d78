"""`mc-calibrate`: measure a bundle, find the settings of a cache policy, store them as a preset.

Neighbours: `calibration_job` finds them; `add_files` replaces the manifest; `mc-generate --policy`
uses the preset. The flags of the settings are those of `mc-generate`.
"""

__all__ = ["main"]

import hashlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from mc_engines.bundle_additions import add_files
from mc_engines.command import command
from mc_engines.errors import BundleError, require
from mc_engines.manifest import Manifest
from mc_runtime.calibration import MIN_STEPS
from mc_runtime.calibration_job import FITTED, Calibration, Job, calibrate
from mc_runtime.flags import INPUT, choose_options, make_say, setting_options
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.prompts import read_prompts
from mc_runtime.threshold_search import Target
from mc_runtime.versions import list_versions
from motioncache import Preset
from motioncache.options import parse_options
from motioncache.presets import POLICIES, PUBLISHED, list_required

# What moves slowly, fast, hardly, and everywhere at once.
PROMPTS = (
    "A red ball rolls slowly across a wooden table.",
    "Waves break against rocks under a grey sky.",
    "A cat sits on a window sill and turns its head.",
    "Cars drive along a busy street at night in the rain.",
    "A woman walks through a field of tall grass.",
    "Snow falls on a quiet mountain village.",
)
_DEFAULT_TARGET = Target("speedup", 2.0)
_ALL = dict.fromkeys(name for known in POLICIES.values() for name in known if name != "none")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@command("mc-calibrate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    type=INPUT,
    help="Text file, a prompt per line; empty lines and those with # are left out. "
    f"Default: {len(PROMPTS)} plain sentences.",
)
@click.option("--target-psnr", type=float, help="dB against the uncached frames; needs a VAE.")
@click.option(
    "--target-speedup",
    type=float,
    help="Times fewer operations of the denoising, computed from the traces. "
    f"Default: {_DEFAULT_TARGET.value:g}.",
)
@click.option(
    "--policy",
    default="motioncache",
    show_default=True,
    help=f"The policy to calibrate: {', '.join(_ALL)}; those that BUNDLE's family has.",
)
@click.option(
    "--policy-option",
    multiple=True,
    metavar="FIELD=VALUE",
    help="A setting that the preset is to have; can be repeated.",
)
@click.option("--name", default="calibrated", show_default=True, help="Of the preset.")
@click.option("--threads", type=click.IntRange(min=1), help="Of one operator; default: all cores.")
@click.option("--overwrite", is_flag=True, help="Replace a preset of that name.")
@setting_options()
def main(
    bundle: Path,
    prompts: Path | None,
    target_psnr: float | None,
    target_speedup: float | None,
    policy: str,
    policy_option: tuple[str, ...],
    name: str,
    threads: int | None,
    overwrite: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Find the settings of a cache policy for BUNDLE by running it, and store them as a preset.

    Every prompt is generated once without a cache: half of them to fit how much the model's output
    changes from step to step, half to try up to ten thresholds on. (Of MAGI-1, and with
    --policy-option coefficients=..., all are for the thresholds.) Choose a small --height, --width
    and --num-frames: at the size of a published model a CPU would take days. Keep the
    --num-inference-steps of the runs that the preset is for.
    """
    target = _choose_target(target_psnr, target_speedup)
    texts = PROMPTS if prompts is None else read_prompts(prompts, least=2)
    pipeline = VideoPipeline.from_bundle(bundle, threads)
    policy_options = _parse_policy_options(pipeline.family.name, policy, policy_option)
    key = _check_preset(pipeline, policy, name, overwrite)
    decode = _check_frames(pipeline, target)
    say = make_say(quiet)
    options = choose_options(pipeline.default_options, settings)
    job = Job(pipeline, texts, options, decode, policy, policy_options, target, key, quiet, say)
    _check_steps(job)
    preset = _make_preset(job, calibrate(job))
    add_files(bundle, {}, partial(_store, preset))
    click.echo(f"Use it: {_command_line(job, preset)}")


def _choose_target(psnr: float | None, speedup: float | None) -> Target:
    if psnr is not None and speedup is not None:
        raise click.UsageError("--target-psnr and --target-speedup: give one of them.")
    if psnr is not None:
        if not 0 < psnr < np.inf:
            raise ValueError(f"target PSNR: expected more than 0 dB, got {psnr:g}. Try 30.")
        return Target("psnr", psnr)
    if speedup is None:
        return _DEFAULT_TARGET
    if not 1 < speedup < np.inf:
        raise ValueError(f"target speed-up: expected more than 1, got {speedup:g}. Try 2.")
    return Target("speedup", speedup)


def _check_preset(pipeline: VideoPipeline, policy: str, name: str, overwrite: bool) -> str:
    """Refuse a preset that could not be stored in the end; return its key."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"name: expected letters, digits, '_', '-' and '.', got '{name}'. Choose another name."
        )
    if name in {preset.name for preset in PUBLISHED if preset.policy == policy}:
        raise ValueError(
            f"name: expected one that no published preset of {policy} has, got {name}. "
            "Choose another name."
        )
    bundle, key = pipeline.bundle, f"{policy}:{name}"
    if key in bundle.manifest.presets and not overwrite:
        raise ValueError(
            f"{bundle.path}: expected no preset {key}, got one. "
            "Replace it with --overwrite, or choose another --name."
        )
    if not os.access(bundle.path, os.W_OK):
        raise BundleError(
            f"{bundle.path}: expected a folder that can be written, got a read-only one. "
            "Calibrate a copy of the bundle."
        )
    return key


def _parse_policy_options(family: str, policy: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Refuse a policy that the family lacks, and thresholds, which are to be found."""
    known = [name for name in POLICIES[family] if name != "none"]
    if policy not in known:
        raise ValueError(
            f"policy: expected one of {', '.join(known)} for the family {family}, got {policy}. "
            "Choose one of these."
        )
    options = parse_options(POLICIES[family][policy].config_type, pairs)
    for field in list_required(policy, family):
        if field in options and field != FITTED:
            raise ValueError(
                f"policy option {field}: expected none, as mc-calibrate finds it, got one. "
                "Leave it out."
            )
    return options


def _check_frames(pipeline: VideoPipeline, target: Target) -> bool:
    """Say whether runs have frames to compare, and refuse a PSNR without them."""
    bundle = pipeline.bundle
    if "vae" in bundle.manifest.config:
        require("skimage.metrics", "bench")
        return True
    if target.metric == "psnr":
        raise ValueError(
            f"target PSNR: expected a bundle with a VAE, got {bundle.path} without one. "
            "Use --target-speedup, or export from a checkpoint that has a VAE."
        )
    return False


def _check_steps(job: Job) -> None:
    """Refuse settings that do not fit the bundle or the policy; nothing is computed yet."""
    policy, steps = job.make_policy(0.0), job.options.num_inference_steps
    policy.check(job.pipeline.plan(job.options).shape)
    least = job.warmup_steps + 1 + MIN_STEPS
    if steps < least:
        raise ValueError(
            f"num_inference_steps: expected at least {least}, {MIN_STEPS} more than the warm-up "
            f"computes in full, got {steps}. Raise it or lower warmup_steps."
        )
    # A rule whose coarse phase lasts for a number of steps; the last one may be forced.
    beyond = getattr(policy.config, "coarse_end", 0) - (steps - 2)
    if beyond > 0:
        coarse = policy.config.coarse_steps
        raise ValueError(
            f"coarse_steps: expected at most {coarse - beyond} with {steps} steps, so that tokens "
            f"are chosen in one, got {coarse}. Lower it by --policy-option, or take flowcache."
        )


def _make_preset(job: Job, result: Calibration) -> Preset:
    """The settings, with where they come from."""
    best = result.best
    psnr = None if best.psnr in (None, np.inf) else best.psnr
    reached = {"psnr": psnr, "flops_speedup": best.speedup, "wall_ratio": best.wall_ratio}
    return Preset(
        job.policy,
        job.key.partition(":")[2],
        asdict(result.policy.config),
        "calibrated",
        _describe_source(job, result),
        family=job.pipeline.bundle.manifest.family,
        steps=job.options.num_inference_steps,
        reached=reached,
    )


def _describe_source(job: Job, result: Calibration) -> str:
    """Everything it takes to judge the preset, or to make it again; no path of this machine."""
    options, count = job.options, len(job.prompts)
    digest = hashlib.sha256("\n".join(job.prompts).encode()).hexdigest()
    return "; ".join(
        (
            f"mc-calibrate, {datetime.now(UTC):%Y-%m-%d}",
            _list_facts(list_versions()),
            f"model {job.pipeline.bundle.model_hash}",
            _list_facts({"policy": job.policy, **job.policy_options}),
            f"target {job.target.metric} {job.target.value:g}",
            f"{count} prompts, sha256 {digest}",
            f"seeds {options.seed} to {options.seed + count - 1}"
            + ", every other one for the fit" * job.rescales,
            _list_facts({key: value for key, value in asdict(options).items() if key != "seed"}),
            result.fit,
        )
    )


def _list_facts(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _store(preset: Preset, manifest: Manifest) -> Manifest:
    return replace(manifest, presets={**manifest.presets, preset.key: preset.to_json()})


def _command_line(job: Job, preset: Preset) -> str:
    """A line that uses the preset, with as many steps as it was made for."""
    line = ["mc-generate", str(job.pipeline.bundle.path), "--policy", preset.key]
    steps = ["--num-inference-steps", str(preset.steps)]
    return shlex.join([*line, *steps, "--prompt", "...", "-o", "video.mp4"])
