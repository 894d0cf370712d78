"""Measure skyreels-mini: `python -m scripts.train_mini.evaluate [PART ...]`, all parts by default.

What is measured is kept in `out/train_mini/evaluation`, and a second call goes on from there.
"""

import argparse
from collections.abc import Callable

from scripts.train_mini.bundle import open_pipeline
from scripts.train_mini.judge import check_judge

from mc_runtime import VideoPipeline

from .codec import measure_codec
from .motion import measure_motion
from .policies import measure_long, measure_policies
from .prompts import measure_prompts
from .sheet import draw_sheet

PARTS: dict[str, Callable[[VideoPipeline], str]] = {
    "codec": measure_codec,
    "judge": lambda pipeline: check_judge(500),
    "prompts": measure_prompts,
    "motion": measure_motion,
    "policies": measure_policies,
    "long": measure_long,
    "sheet": draw_sheet,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    chosen = parser.parse_args().parts or list(PARTS)
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        parser.error(
            f"PART: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}. Leave it out."
        )
    pipeline = open_pipeline()
    for part in chosen:
        print(PARTS[part](pipeline), flush=True)
