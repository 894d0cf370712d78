"""A sheet of samples: the first held-out prompts, unchosen, a row of frames each."""

__all__ = ["SHEET", "draw_sheet"]

from pathlib import Path

from scripts.frame_strip import lay_out

from mc_runtime import VideoPipeline

from .scenes import held_out_scenes
from .weights import watch_scene

SHEET = Path(__file__).parents[3] / "docs" / "pictures" / "skyreels-mini.png"
_ROWS = 10


def draw_sheet(pipeline: VideoPipeline) -> str:
    """Write the sheet, of videos that `measure_prompts` judges too; return its captions, by row."""
    scenes = held_out_scenes(_ROWS)
    videos = [watch_scene(pipeline, seed, scene)[0] for seed, scene in enumerate(scenes)]
    SHEET.parent.mkdir(exist_ok=True)
    lay_out(videos).save(SHEET, optimize=True)
    rows = [f"  {row + 1:>2}  {scene.caption()}" for row, scene in enumerate(scenes)]
    return "\n".join([f"{SHEET.name}, rows:", *rows])
