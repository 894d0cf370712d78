"""Fetching a published checkpoint, from a stand-in for the hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mc_engines.errors import MissingExtraError
from mc_engines.published import FAMILY_DEFAULTS, PUBLISHED_BY_FAMILY
from mc_export.checkpoint import ACCEPTED_FORMS, load_checkpoint
from mc_export.families import FAMILIES
from mc_export.fetch import fetch_checkpoint

REPOSITORY = "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers"
COMMIT = "0123456789" * 4
GOLDEN = Path(__file__).parents[1] / "golden" / "skyreels-a" / "transformer"
WANTED = {
    "LICENSE.txt": b"terms",
    "model_index.json": b'{"_class_name": "SkyReelsV2DiffusionForcingPipeline"}',
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/tokenizer.json": b"{}",
    **{f"transformer/{file.name}": file.read_bytes() for file in GOLDEN.iterdir()},
}
UNWANTED = {"README.md": b"#", "assets/demo.mp4": b"0", "transformer/model.bin": b"0"}


class Hub(BaseHTTPRequestHandler):
    """The three requests of the Hugging Face hub that a download takes; any other is a 404."""

    files = WANTED | UNWANTED

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        file = path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
        if path == f"/api/models/{REPOSITORY}/revision/main":
            content = json.dumps({"id": REPOSITORY, "sha": COMMIT}).encode()
        elif path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            content = json.dumps([self.entry(name) for name in self.files]).encode()
        elif file in self.files:
            content = self.files[file]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def entry(self, name: str) -> dict[str, object]:
        content = self.files[name]
        digest = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": digest}

    def log_message(self, *_: object) -> None:
        """Keep the tests quiet."""


SCRIPT = """
import json
from mc_export.fetch import fetch_checkpoint
got = {}
for model in ("skyreels", "skyreels-df-14b-720p"):
    try:
        got[model] = str(fetch_checkpoint(model))
    except Exception as error:
        got[model] = f"{type(error).__name__}: {error}"
print(json.dumps(got))
"""


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What fetching gives, by model; in a process that finds the stand-in instead of the hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | settings, capture_output=True, text=True
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_familys_checkpoint_is_fetched_without_what_is_not_needed(fetched: dict) -> None:
    folder = Path(fetched["skyreels"])
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert files == WANTED
    checkpoint = load_checkpoint(folder)
    assert checkpoint.tokenizer == folder / "tokenizer" and checkpoint.scheduler == {}


def test_a_checkpoint_that_the_hub_does_not_give_is_named(fetched: dict) -> None:
    message = fetched["skyreels-df-14b-720p"]
    name = "Skywork/SkyReels-V2-DF-14B-720P-Diffusers"
    assert message.startswith(f"CheckpointError: {name}: expected to fetch it from the Hugging Fac")
    assert message.endswith(f"Try again, or give --checkpoint: {ACCEPTED_FORMS}.")


def test_without_the_hubs_library_the_accepted_forms_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError) as caught:
        fetch_checkpoint("skyreels")
    assert str(caught.value) == (
        "huggingface_hub: not installed. Run: pip install 'motioncache[export]', to fetch "
        f"{REPOSITORY}; or give --checkpoint: {ACCEPTED_FORMS}."
    )


@pytest.mark.parametrize("model", ["wan", "magi", "magi-24b"])
def test_an_unknown_model_is_refused(model: str) -> None:
    pattern = rf"model: expected one of skyreels, skyreels-df-.*, got '{model}'\."
    with pytest.raises(ValueError, match=pattern):
        fetch_checkpoint(model)


def test_every_family_has_a_published_checkpoint() -> None:
    assert FAMILY_DEFAULTS.keys() == PUBLISHED_BY_FAMILY.keys() == FAMILIES.keys()
    for family, name in FAMILY_DEFAULTS.items():
        assert name in PUBLISHED_BY_FAMILY[family]
