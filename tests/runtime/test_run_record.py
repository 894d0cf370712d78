"""A record holds what repeats a run, and is refused where it would repeat another."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mc_runtime.options import Chunk, GenerationOptions
from mc_runtime.run_record import hash_files, read_options, record_run, write_record
from motioncache import make_policy, none

OPTIONS = GenerationOptions(num_frames=17, seed=7, sigma_table="skyreels", guidance_scale=1.5)
POLICY = make_policy("flowcache", {"threshold": 0.1, "coefficients": (1.0, 0.0)})
RAN_ON = {"backend": "tensorrt-rtx", "dtype": "fp16", "engines": "/e", "gpu": "A GPU"}
TEXTS = {"prompt": "a bird, grün", "negative_prompt": None}


def bundle(path, digest="ab" * 32):
    return SimpleNamespace(path=path, model_hash=digest)


@pytest.fixture
def saved(tmp_path):
    (tmp_path / "noise.npz").write_bytes(b"noise")
    files = hash_files({"latents": tmp_path / "noise.npz"})
    chunk = Chunk(0, 4, np.zeros((16, 5, 2, 2), np.float32), None, 2.5, 0.5, {"full": 3})
    record = record_run(
        bundle(tmp_path / "b"), OPTIONS, TEXTS, files, 2, POLICY, [chunk], True, RAN_ON
    )
    write_record(tmp_path / "out.json", record)
    return tmp_path / "out.json"


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_record_gives_back_what_was_set(saved, tmp_path):
    assert read_options(saved, bundle(tmp_path / "elsewhere"), GenerationOptions()) == {
        **vars(OPTIONS), **TEXTS, "latents": tmp_path / "noise.npz", "threads": 2,
        "policy": "flowcache", "policy_option": ("threshold=0.1", "coefficients=1.0,0.0",
        "warmup_steps=4", "extrapolation=none", "compat=fixed"), "preset": None,
        "backend": "tensorrt-rtx", "dtype": "fp16", "engines": Path("/e"), "ran_on": RAN_ON,
    }  # fmt: skip


def test_a_record_from_before_it_said_what_ran_it_is_of_the_cpu(saved, tmp_path):
    record = json.loads(saved.read_text())
    del record["ran_on"]
    saved.write_text(json.dumps(record))
    values = read_options(saved, bundle(tmp_path), GenerationOptions())
    assert values["backend"] == "cpu" and values["dtype"] is None and values["ran_on"] == {}


def test_a_record_says_what_was_run(saved, tmp_path):
    record = json.loads(saved.read_text(encoding="utf-8"))
    assert "grün" in saved.read_text(encoding="utf-8")
    assert record["bundle"] == {"path": str(tmp_path / "b"), "hash": "ab" * 32}
    assert record["interrupted"] is True and record["ran_on"] == RAN_ON
    assert record["chunks"] == [
        {"index": 0, "of": 4, "seconds": 2.5, "decode_seconds": 0.5, "computed": {"full": 3}}
    ]
    assert {"motioncache", "numpy", "onnxruntime", "python"} <= record["versions"].keys()
    assert record["versions"]["numpy"] == np.__version__
    assert record["files"]["latents"]["sha256"] == hashlib.sha256(b"noise").hexdigest()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_paths_are_of_use_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noise.npz").touch()
    relative = type(tmp_path)("noise.npz")
    assert hash_files({"latents": relative})["latents"]["path"] == str(tmp_path / "noise.npz")
    record = record_run(bundle(type(tmp_path)("b")), OPTIONS, {}, {}, None, none(), [], False, {})
    assert record["bundle"]["path"] == str(tmp_path / "b")


def test_another_bundle_is_refused(saved, tmp_path):
    with pytest.raises(ValueError) as caught:
        read_options(saved, bundle(tmp_path / "c", "cd" * 32), GenerationOptions())
    assert str(caught.value) == (
        f"{saved}: expected the bundle abababababab, got {tmp_path / 'c'} with cdcdcdcdcdcd. "
        "Repeat the run on the bundle it used."
    )


@pytest.mark.parametrize("change", [lambda p: p.write_bytes(b"other"), lambda p: p.unlink()])
def test_an_input_that_changed_is_refused(saved, tmp_path, change):
    change(tmp_path / "noise.npz")
    with pytest.raises(ValueError) as caught:
        read_options(saved, bundle(tmp_path), GenerationOptions())
    assert str(caught.value) == (
        f"{tmp_path / 'noise.npz'}: expected the file of the recorded run, got another or none. "
        "Restore it, or run without --repeat."
    )


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b"text"])
def test_what_is_no_record_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_options(tmp_path / "x.json", bundle(tmp_path), GenerationOptions())
    assert str(caught.value).startswith(f"{tmp_path / 'x.json'}: expected the JSON of a run, got: ")
    assert str(caught.value).endswith(". Pass one that mc-generate wrote.")


def test_another_schema_is_refused(saved, tmp_path):
    change(saved, schema="other/v1")
    with pytest.raises(ValueError) as caught:
        read_options(saved, bundle(tmp_path), GenerationOptions())
    assert str(caught.value) == (
        f"{saved}: expected schema motioncache.run/v1, got other/v1. "
        "Pass one that mc-generate wrote."
    )


@pytest.mark.parametrize(
    "entries",
    [
        {"ran_on": "cpu"},
        {"options": {"speed": 1}},
        {"options": None},
        {"files": {"video": {}}},
        {"files": []},
    ],
)
def test_a_damaged_record_is_refused(saved, tmp_path, entries):
    change(saved, **entries)
    with pytest.raises(ValueError, match=r"expected a whole record, got one .* mc-generate wrote."):
        read_options(saved, bundle(tmp_path), GenerationOptions())


def test_a_full_disk_names_the_record(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")
    error = OSError(28, "No space left on device")
    monkeypatch.setattr(type(path), "write_text", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(OSError) as caught:
        write_record(path, {})
    assert str(caught.value) == (
        f"{path}: expected a file that can be written, got: No space left on device. "
        "Make room, or choose another folder."
    )
    assert path.read_text() == "old"
