"""Make the cache presets of skyreels-mini: `python -m scripts.train_mini.presets`.

`mc-calibrate` fits and searches on prompts of the training split, for the same speed-up with every
policy, so that they can be compared; what it found goes beside the weights, from where `mc-export`
takes it into every bundle.
"""

__all__ = ["PRESETS"]

import json
import subprocess

from mc_engines.bundle import Bundle
from mc_export.fetch import PACKAGED

from .bundle import BUNDLE, open_pipeline
from .job import OUT, THREADS
from .world import SEEDS, draw_scene

# Steps are counted, and what is reused follows its line: docs/decisions/012.
_AHEAD = ("coefficients=0,1", "extrapolation=1")
PRESETS: dict[str, tuple[str, ...]] = {
    "teacache:calibrated": (*_AHEAD, "warmup_steps=0"),
    "flowcache:calibrated": (*_AHEAD, "warmup_steps=2"),
    "motioncache:calibrated": (*_AHEAD, "warmup_steps=2", "weight_floor=0.8", "min_update_ratio=0"),
    "motioncache:fitted": (),  # as published: fitted distances, and what is reused stays
}
_PROMPTS = 4
_SPEEDUP = 3.4  # by FLOPs


def make_presets() -> None:
    """Calibrate every preset on the bundle of the packaged model, and write them beside it."""
    open_pipeline()
    first, prompts = SEEDS["calibration"], OUT / "calibration.txt"
    scenes = [draw_scene(seed) for seed in range(first, first + _PROMPTS)]
    prompts.write_text("".join(f"{scene.caption()}\n" for scene in scenes))
    for key, options in PRESETS.items():
        policy, _, name = key.partition(":")
        command = ["mc-calibrate", str(BUNDLE), "--policy", policy, "--name", name, "--overwrite"]
        command += [f"--policy-option={option}" for option in options]
        command += ["--prompts", str(prompts), "--target-speedup", str(_SPEEDUP)]
        subprocess.run([*command, "--seed", str(first), "--threads", str(THREADS)], check=True)
    presets = Bundle.open(BUNDLE).manifest.presets
    chosen = {key: presets[key] for key in PRESETS}
    (PACKAGED / "presets.json").write_text(json.dumps(chosen, indent=2) + "\n")


if __name__ == "__main__":
    make_presets()
