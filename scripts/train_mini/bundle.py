"""The bundle of the model in the package, which calibration and evaluation run."""

__all__ = ["BUNDLE", "open_pipeline"]

import hashlib
import subprocess

from mc_export.fetch import PACKAGED
from mc_runtime import VideoPipeline

from .job import OUT, THREADS

BUNDLE = OUT / "mini.bundle"
_EXPORTER = PACKAGED.parent


def open_pipeline() -> VideoPipeline:
    """Open the bundle, exporting it anew where the model, its presets or the exporter changed."""
    digest = hashlib.sha256()
    for path in sorted(_EXPORTER.rglob("*")):
        if path.is_file() and path.suffix not in (".md", ".pyc"):
            digest.update(path.read_bytes())
    exported = OUT / "mini.sha256"
    known = exported.read_text() if exported.exists() and BUNDLE.exists() else None
    if known != digest.hexdigest():
        OUT.mkdir(parents=True, exist_ok=True)
        command = ["mc-export", "--model", "skyreels-mini", "-o", str(BUNDLE), "--overwrite"]
        subprocess.run([*command, "--quiet"], check=True)
        exported.write_text(digest.hexdigest())
    return VideoPipeline.from_bundle(BUNDLE, threads=THREADS)
