"""Where measurements are kept, so that one that was cut off goes on: a line of JSON per clip.

Files lie under the identity of the model, so that another model is measured anew.
"""

__all__ = ["Record", "results_folder", "take_records"]

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.train_mini.job import OUT
from scripts.train_mini.world import Scene

from mc_runtime import VideoPipeline

Record = dict[str, Any]


def results_folder(pipeline: VideoPipeline) -> Path:
    """Return the folder of this model's results, `out/train_mini/evaluation/<model>`."""
    folder = OUT / "evaluation" / pipeline.bundle.model_hash[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def take_records(
    pipeline: VideoPipeline,
    name: str,
    scenes: Sequence[Scene],
    measure: Callable[[int, Scene], Record],
) -> list[Record]:
    """Measure scenes one after the other; those that are on file are not measured again.

    Args:
        pipeline: Of the model.
        name: Of the file.
        scenes: What to measure. A file of other scenes is begun anew.
        measure: Makes the record of a scene, with its place in `scenes`, which also seeds noise.
    """
    path = results_folder(pipeline) / f"{name}.jsonl"
    captions = [scene.caption() for scene in scenes]
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if [record["caption"] for record in records] != captions[: len(records)]:
        path.unlink()
        records = []
    with path.open("a") as file:
        for place in range(len(records), len(scenes)):
            values = measure(place, scenes[place])
            records.append({"caption": captions[place], **values})
            file.write(json.dumps(records[-1], allow_nan=False) + "\n")
            file.flush()
            print(f"  {name} {len(records)} of {len(scenes)}", end="\r", flush=True)
    return records
