"""Make the cache presets of skyreels-mini: `python -m scripts.train_mini.presets`.

`mc-calibrate` fits and searches on prompts of the training split, for the same speed-up with every
policy, so that they can be compared; what it found goes beside the weights, from where `mc-export`
takes it into every bundle.
"""

import json
import subprocess

from mc_engines.bundle import Bundle
from mc_export.fetch import PACKAGED

from .evaluate.records import BUNDLE, open_pipeline
from .job import OUT, THREADS
from .world import SEEDS, draw_scene

POLICIES = ("teacache", "flowcache", "motioncache")
PROMPTS = 4
SPEEDUP = 3.5  # by FLOPs

if __name__ == "__main__":
    open_pipeline()
    first, prompts = SEEDS["calibration"], OUT / "calibration.txt"
    scenes = [draw_scene(seed) for seed in range(first, first + PROMPTS)]
    prompts.write_text("".join(f"{scene.caption()}\n" for scene in scenes))
    for policy in POLICIES:
        command = ["mc-calibrate", str(BUNDLE), "--policy", policy, "--prompts", str(prompts)]
        command += ["--target-speedup", str(SPEEDUP), "--seed", str(first)]
        subprocess.run([*command, "--threads", str(THREADS), "--overwrite"], check=True)
    presets = Bundle.open(BUNDLE).manifest.presets
    (PACKAGED / "presets.json").write_text(json.dumps(presets, indent=2) + "\n")
