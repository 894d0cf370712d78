"""Where measurements are kept, so that one that was cut off goes on: a line of JSON per clip.

Files lie under the identity of the model, so that another model is measured anew.
"""

__all__ = ["BUNDLE", "Record", "open_pipeline", "results_folder", "take_records"]

import hashlib
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.train_mini.job import OUT, THREADS
from scripts.train_mini.world import Scene

from mc_export.fetch import PACKAGED
from mc_runtime import VideoPipeline

BUNDLE = OUT / "mini.bundle"

Record = dict[str, Any]


def open_pipeline() -> VideoPipeline:
    """Open the bundle of the model in the package, exporting it where it is another or none."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGED.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            digest.update(path.read_bytes())
    exported = OUT / "mini.sha256"
    known = exported.read_text() if exported.exists() and BUNDLE.exists() else None
    if known != digest.hexdigest():
        command = ["mc-export", "--model", "skyreels-mini", "-o", str(BUNDLE), "--overwrite"]
        subprocess.run([*command, "--quiet"], check=True)
        exported.write_text(digest.hexdigest())
    return VideoPipeline.from_bundle(BUNDLE, threads=THREADS)


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
