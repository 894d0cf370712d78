"""`mc-calibrate`: measure a bundle, find the settings of a cache policy, store them as a preset.

Neighbours: `calibration` measures, fits and searches; `add_files` replaces the manifest;
`mc-generate --policy` uses the preset. The flags of the settings are those of `mc-generate`.
"""

__all__ = ["main"]

import hashlib
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from mc_runtime.calibration import (
    MIN_STEPS,
    Fit,
    Reference,
    Samples,
    fit_rescaling,
    join_samples,
    measure_r_squared,
    record_changes,
)
from mc_runtime.display import Display
from mc_runtime.flags import INPUT, choose_options, make_say, setting_options
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.prompts import encode_prompts, read_prompts
from mc_runtime.threshold_search import (
    Target,
    Trial,
    bound_threshold,
    measure_trial,
    search_threshold,
)
from mc_runtime.versions import list_versions
from motioncache import Policy, Preset, make_policy
from motioncache.options import parse_options
from motioncache.presets import POLICIES, PUBLISHED

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
_LOW_R_SQUARED = 0.5
_SETTLED = "threshold", "coefficients"  # what is measured and searched
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class _Job:
    """What is to be calibrated; `options` has the seed of the first prompt's run."""

    pipeline: VideoPipeline
    prompts: Sequence[str]
    options: GenerationOptions
    decode: bool
    policy: str
    policy_options: Mapping[str, Any]
    target: Target
    key: str
    quiet: bool
    say: Callable[[str], None]

    @property
    def warmup_steps(self) -> int:
        """Of the policy: its last step that is computed in full."""
        warmup_steps: int = self.make_policy(0.0, (1.0, 0.0)).config.warmup_steps
        return warmup_steps

    def make_policy(self, threshold: float, coefficients: tuple[float, ...]) -> Policy:
        """Bind a threshold and coefficients."""
        settled = {"threshold": threshold, "coefficients": coefficients}
        family = self.pipeline.family.name
        return make_policy(self.policy, {**self.policy_options, **settled}, family)


@dataclass(frozen=True)
class _Result:
    """What a calibration found; `r_squared` is that on the runs that were not fitted."""

    fit: Fit
    r_squared: float
    best: Trial


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
    type=click.Choice([name for name in POLICIES["skyreels"] if name != "none"]),
    default="motioncache",
    show_default=True,
    help="The policy to calibrate.",
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
    changes from step to step, half to try up to ten thresholds on. Choose a small --height,
    --width and --num-frames: at the size of a published model a CPU would take days. Keep the
    --num-inference-steps of the runs that the preset is for.
    """
    target = _choose_target(target_psnr, target_speedup)
    texts = PROMPTS if prompts is None else read_prompts(prompts, least=2)
    pipeline = VideoPipeline.from_bundle(bundle, threads)
    pipeline.family.require("mc-calibrate")
    key = _check_preset(pipeline, policy, name, overwrite)
    policy_options = _parse_policy_options(pipeline.family.name, policy, policy_option)
    decode = _check_frames(pipeline, target)
    say = make_say(quiet)
    options = choose_options(pipeline.default_options, settings)
    job = _Job(pipeline, texts, options, decode, policy, policy_options, target, key, quiet, say)
    _check_steps(job)
    preset = _make_preset(job, _calibrate(job))
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
    options = parse_options(POLICIES[family][policy].config_type, pairs)
    for field in _SETTLED:
        if field in options:
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


def _check_steps(job: _Job) -> None:
    """Refuse settings that do not fit the bundle or the policy; nothing is computed yet."""
    job.make_policy(0.0, (1.0, 0.0)).check(job.pipeline.plan(job.options).shape)
    steps, least = job.options.num_inference_steps, job.warmup_steps + 1 + MIN_STEPS
    if steps < least:
        raise ValueError(
            f"num_inference_steps: expected at least {least}, {MIN_STEPS} more than the warm-up "
            f"computes in full, got {steps}. Raise it or lower warmup_steps."
        )


def _plan_runs(job: _Job) -> list[dict[str, Any]]:
    """Make the arguments of one run per prompt, each with a seed of its own."""
    encoded = encode_prompts(job.pipeline, job.prompts, job.options, job.say)
    return [
        {
            **embeddings,
            "options": replace(job.options, seed=job.options.seed + number),
            "decode": job.decode,
        }
        for number, embeddings in enumerate(encoded)
    ]


def _calibrate(job: _Job) -> _Result:
    """Fit on the runs of one half, search on those of the other, and print both."""
    runs = _plan_runs(job)
    fitted: list[Samples] = []
    references: list[Reference] = []
    for number, inputs in enumerate(runs):
        reference = _record(job, number, inputs)
        if number % 2:
            references.append(reference)
        else:  # its frames need not be kept
            fitted.append(reference.samples)
    fit = fit_rescaling(join_samples(fitted).after(job.warmup_steps))
    others = join_samples([reference.samples for reference in references]).after(job.warmup_steps)
    r_squared = measure_r_squared(fit.coefficients, others)
    click.echo(
        f"Fit: degree {fit.degree}, R-squared {fit.r_squared:.3f} on {len(fitted)} runs, "
        f"{r_squared:.3f} on {len(references)} others."
    )
    if min(fit.r_squared, r_squared) < _LOW_R_SQUARED:
        job.say(
            "How far the timestep moves says little about how much this model's output changes: "
            "the policy will hardly do better than reuse at fixed intervals."
        )
    return _Result(fit, r_squared, _search(job, fit, references))


def _record(job: _Job, number: int, inputs: Mapping[str, Any]) -> Reference:
    purpose = "search" if number % 2 else "fit"
    job.say(f"Uncached run {number + 1} of {len(job.prompts)}, for the {purpose}")
    with Display(job.quiet) as display:
        return record_changes(job.pipeline, inputs, display.advance)


def _search(job: _Job, fit: Fit, references: Sequence[Reference]) -> Trial:
    """Search the threshold, and print a line per trial."""
    click.echo(f"{'threshold':>11}{'speed-up':>10}{'wall ratio':>12}{'PSNR':>11}")

    def evaluate(threshold: float) -> Trial:
        policy = job.make_policy(threshold, fit.coefficients)
        with Display(job.quiet) as display:
            trial = measure_trial(job.pipeline, policy, references, display.advance)
        click.echo(_row(trial))
        return trial

    any_threshold = job.make_policy(0.0, fit.coefficients)
    bound = bound_threshold(job.pipeline, job.options, any_threshold, fit)
    best, _ = search_threshold(evaluate, job.target, bound)
    click.echo(f"{_row(best)}  kept")
    return best


def _row(trial: Trial) -> str:
    psnr = {None: "", np.inf: "identical"}.get(trial.psnr, f"{trial.psnr or 0:.2f} dB")
    return f"{trial.threshold:>11g}{trial.speedup:>10.2f}{trial.wall_ratio:>12.2f}{psnr:>11}"


def _make_preset(job: _Job, result: _Result) -> Preset:
    """The settings, with where they come from."""
    best, policy = result.best, job.make_policy(result.best.threshold, result.fit.coefficients)
    psnr = None if best.psnr in (None, np.inf) else best.psnr
    reached = {"psnr": psnr, "flops_speedup": best.speedup, "wall_ratio": best.wall_ratio}
    return Preset(
        job.policy,
        job.key.partition(":")[2],
        asdict(policy.config),
        "calibrated",
        _describe_source(job, result),
        family=job.pipeline.bundle.manifest.family,
        steps=job.options.num_inference_steps,
        reached=reached,
    )


def _describe_source(job: _Job, result: _Result) -> str:
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
            f"seeds {options.seed} to {options.seed + count - 1}, every other one for the fit",
            _list_facts({key: value for key, value in asdict(options).items() if key != "seed"}),
            f"degree {result.fit.degree}, R-squared {result.fit.r_squared:.4f}, "
            f"on other prompts {result.r_squared:.4f}",
        )
    )


def _list_facts(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _store(preset: Preset, manifest: Manifest) -> Manifest:
    return replace(manifest, presets={**manifest.presets, preset.key: preset.to_json()})


def _command_line(job: _Job, preset: Preset) -> str:
    """A line that uses the preset, with as many steps as it was made for."""
    line = ["mc-generate", str(job.pipeline.bundle.path), "--policy", preset.key]
    steps = ["--num-inference-steps", str(preset.steps)]
    return shlex.join([*line, *steps, "--prompt", "...", "-o", "video.mp4"])
