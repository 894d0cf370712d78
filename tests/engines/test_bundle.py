"""A bundle opens if it is whole; whatever is wrong with it has a message of its own."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mc_engines import manifest as manifest_module
from mc_engines.bundle import Bundle
from mc_engines.bundle_additions import add_files
from mc_engines.bundle_writer import BundleWriter
from mc_engines.errors import BundleError
from mc_engines.manifest import Manifest, is_inside
from mc_engines.specs import ComponentSpec, GraphSpec, TensorSpec
from mc_engines.verify import find_faults

WEIGHTS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([1, 2, 3])}
FILES = [
    "onnx/block.fp32.onnx", "onnx/block.fp16.onnx", "onnx/block.bf16.onnx", "tokenizer/t.json",
    "weights/block.00.safetensors", "weights/block.01.safetensors",
]  # fmt: skip


def block_graph(form: str, dtype: str) -> GraphSpec:
    return GraphSpec(
        f"onnx/block.{form}.onnx",
        inputs=(TensorSpec("x", dtype, (1, "K", 2)),),
        outputs=(TensorSpec("y", dtype, (1, "K", 3)),),
        weights=(TensorSpec("w", dtype, (2, 3)), TensorSpec("b", "float32", (3,))),
    )


def a_manifest(**changes: object) -> Manifest:
    dtypes = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    block = ComponentSpec(
        "block",
        {form: block_graph(form, dtype) for form, dtype in dtypes.items()},
        ("weights/block.00.safetensors", "weights/block.01.safetensors"),
    )
    values = {
        "family": "skyreels",
        "model": None,
        "weights_dtype": "float32",
        "missing": ("text_encoder", "vae"),
        "config": {"transformer": {"layers": 2}},
        "components": {"block": block},
    }
    return Manifest(**{**values, **changes})


def write_files(folder: Path) -> None:
    for file in FILES:
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({**WEIGHTS, "w": WEIGHTS["w"] + int(path.stem[-2:])}, path)
        else:
            path.write_bytes(f"content of {file}".encode())


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "bundle"
    with BundleWriter(path) as writer:
        write_files(writer.folder)
        writer.finish(a_manifest())
    return path


@pytest.fixture
def path(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def rewrite_manifest(path: Path, change) -> None:
    """Change the manifest as a program that also updates the hash would."""
    value = json.loads((path / "manifest.json").read_bytes())
    change(value)
    data = json.dumps(value).encode()
    (path / "manifest.json").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    (path / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


def test_a_sound_bundle_opens_and_has_no_faults(path):
    bundle = Bundle.open(str(path))
    assert bundle.path == path
    assert bundle.hash == hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    assert sorted(bundle.manifest.files) == sorted(FILES)
    assert dataclasses.replace(bundle.manifest, files={}) == a_manifest()
    assert find_faults(path) == []


def test_the_manifest_round_trips():
    manifest = a_manifest(presets={"fast": {"threshold": 0.1}}, model="skyreels-df-1.3b-540p")
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_the_system_tool_agrees_with_manifest_sha256(path):
    assert os.system(f"cd {path} && sha256sum --check --strict --quiet manifest.sha256") == 0


# Damage


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("file", [*FILES, "manifest.json", "manifest.sha256"])
def test_a_flipped_byte_in_any_file_is_found(path, file, where):
    content = bytearray((path / file).read_bytes())
    position = {"first": 0, "middle": len(content) // 2, "last": -1}[where]
    content[position] ^= 1
    (path / file).write_bytes(content)
    faults = find_faults(path)
    assert len(faults) == 1
    if file in FILES:
        assert f"{path}: {file}: expected sha256 " in faults[0]
        assert faults[0].endswith("Copy the bundle again, or export it again.")
    else:
        assert "manifest.sha256: expected '" in faults[0]
        with pytest.raises(BundleError, match="One of the two was changed or damaged"):
            Bundle.open(path)


@pytest.mark.parametrize("bit", [1, 1 << 5])  # the second turns a digit's letter into upper case
def test_a_flipped_bit_anywhere_in_manifest_sha256_is_found(path, bit):
    content = (path / "manifest.sha256").read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= bit
        (path / "manifest.sha256").write_bytes(flipped)
        with pytest.raises(BundleError):
            manifest_module.read_manifest(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: b"",
        lambda line: line * 3,
        lambda line: line.rstrip(),
        lambda line: line.replace(b"\n", b"\r\n"),
        lambda line: line + b"and more\n",
    ],
)
def test_manifest_sha256_has_one_form(path, change):
    (path / "manifest.sha256").write_bytes(change((path / "manifest.sha256").read_bytes()))
    with pytest.raises(BundleError, match="One of the two was changed or damaged"):
        Bundle.open(path)


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file_does_not_open(path, file):
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[:-1])
    size = len(content)
    with pytest.raises(BundleError, match=f"{file}: expected {size} bytes, got {size - 1}."):
        Bundle.open(path)


@pytest.mark.parametrize("file", [*FILES, "onnx"])
def test_a_missing_file_does_not_open(path, file):
    shutil.rmtree(path / file) if file == "onnx" else (path / file).unlink()
    with pytest.raises(BundleError, match=r"expected \d+ bytes, got no file. Copy the bundle"):
        Bundle.open(path)


def test_an_engine_that_is_a_link_does_not_open(path):
    add_files(path, {"engines/x-1/block.engine": b"plan"})
    engine = path / "engines/x-1/block.engine"
    shutil.move(engine, path.parent / "elsewhere")
    engine.symlink_to(path.parent / "elsewhere")
    with pytest.raises(BundleError, match="expected a regular file, got a link"):
        Bundle.open(path)


@pytest.mark.parametrize("file", ["manifest.json", "manifest.sha256"])
def test_a_half_written_bundle_does_not_open(path, file):
    (path / file).unlink()
    with pytest.raises(BundleError, match=rf"expected {file}, got a folder without it. It is not"):
        Bundle.open(path)


def test_a_path_without_a_bundle_does_not_open(tmp_path):
    with pytest.raises(BundleError, match="folder of a bundle, got nothing at this path"):
        Bundle.open(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="folder of a bundle, got a file"):
        Bundle.open(tmp_path / "file")


@pytest.mark.parametrize("file", [*FILES, "onnx", "manifest.json", "manifest.sha256"])
def test_a_link_does_not_open_even_if_it_leads_to_the_same_content(path, file):
    shutil.move(path / file, path.parent / "elsewhere")
    (path / file).symlink_to(path.parent / "elsewhere")
    with pytest.raises(BundleError, match=r"expected a regular file, got a link"):
        Bundle.open(path)
    assert "got a link" in find_faults(path)[0]


def test_a_link_to_the_bundle_itself_opens(path):
    (path.parent / "link").symlink_to(path)
    assert Bundle.open(path.parent / "link").manifest.family == "skyreels"
    assert find_faults(path.parent / "link") == []


def test_a_folder_in_the_place_of_a_file_does_not_open(path):
    (path / "tokenizer/t.json").unlink()
    (path / "tokenizer/t.json").mkdir()
    with pytest.raises(BundleError, match="expected a regular file, got something else"):
        Bundle.open(path)


@pytest.mark.parametrize(
    "outside", ["../secret", "/etc/passwd", "onnx/../../secret", "C:/x", "a\\b"]
)
def test_a_path_that_leads_outside_does_not_open(path, outside):
    (path.parent / "secret").write_text("x")
    rewrite_manifest(
        path, lambda value: value["files"].update({outside: {"size": 1, "sha256": "0" * 64}})
    )
    with pytest.raises(BundleError, match=r"path inside the bundle, got one that is not. Do not"):
        Bundle.open(path)
    assert any(f"{outside}: expected a path inside" in fault for fault in find_faults(path))


@pytest.mark.parametrize("key", ["graph", "weights"])
def test_a_component_cannot_use_a_file_outside(path, key):
    def change(value):
        block = value["components"]["block"]
        if key == "graph":
            block["graphs"]["fp32"]["file"] = "../secret"
        else:
            block["weight_files"][0] = "../secret"

    rewrite_manifest(path, change)
    with pytest.raises(BundleError, match=r"component 'block': expected '\.\./secret' among"):
        Bundle.open(path)


def test_every_fault_is_listed(path):
    (path / FILES[0]).write_bytes(b"short")
    (path / FILES[1]).unlink()
    (path / FILES[3]).write_bytes((path / FILES[3]).read_bytes()[::-1])
    (path / "onnx/foreign").write_text("x")
    (path / "onnx/.hidden").write_text("x")
    (path / "onnx/link").symlink_to("foreign")
    (path / "weights/loop").symlink_to("..")
    (path / ".lock").write_text("not empty")
    (path / FILES[4]).chmod(0o600)
    (path / "tokenizer").chmod(0o700)
    faults = find_faults(path)
    for expected in (
        f"{FILES[0]}: expected ",
        f"{FILES[1]}: expected ",
        f"{FILES[3]}: expected sha256",
        "onnx/foreign: expected only files of the manifest, got another. Delete it",
        "onnx/.hidden: expected only",
        "onnx/link: expected no links, got one. Delete it.",
        "weights/loop: expected no links",
        ".lock: expected only",
        f"{FILES[4]}: expected a file that other users can read, got mode 0600. Run: chmod a+r /",
        "tokenizer: expected a folder that other users can read, got mode 0700. Run: chmod a+rx",
    ):
        assert sum(expected in fault for fault in faults) == 1, expected
    assert len(faults) == 10


# The manifest's own form


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(schema_version=2, tool_version="0.9"),
         "expected schema_version 1, got 2. Export again, or read it with motioncache 0.9"),
        (lambda v: v.pop("schema_version"), "expected schema_version 1, got None"),
        (lambda v: v.pop("family"), "manifest.json: expected the fields "),
        (lambda v: v.update(extra=1), "manifest.json: expected the fields "),
        (lambda v: v.update(config=[]), r"field 'config': expected an object, got \[\]"),
        (lambda v: v.update(model=3), "field 'model': expected a string or null, got 3"),
        (lambda v: v["components"]["block"].pop("graphs"), "KeyError"),
        (lambda v: v["components"].update(block=[]), "as docs/bundle.md describes, got TypeError"),
        (lambda v: v["files"].update(a={"size": 1}), "as docs/bundle.md describes, got TypeError"),
    ],
)  # fmt: skip
def test_a_manifest_of_another_form_is_refused(path, change, message):
    rewrite_manifest(path, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(path)


@pytest.mark.parametrize(("data", "got"), [(b"{", "JSON, got "), (b"[]", "an object, got list")])
def test_a_manifest_that_is_no_object_is_refused(data, got):
    with pytest.raises(BundleError, match=f"manifest.json: expected {got}"):
        Manifest.from_bytes(data)


@given(st.text())
def test_only_one_spelling_of_a_path_inside_is_accepted(relative):
    if is_inside(relative):
        plain = PurePosixPath(relative)
        assert str(plain) == relative
        assert not plain.is_absolute()
        assert os.path.normpath(os.path.join("/bundle", relative)) == f"/bundle/{relative}"


@given(st.lists(st.sampled_from(["a", "b.c", "..", ".", "", "é", "..."]), min_size=1).map("/".join))
def test_paths_of_names_are_inside_unless_a_part_is_special(relative):
    expected = not {"", ".", ".."} & set(relative.split("/"))
    assert is_inside(relative) == expected


@pytest.mark.parametrize(
    "name", ["manifest.json", "manifest.sha256", ".lock", "a\0", "a\nb", "\ud800"]
)
def test_names_that_are_taken_or_unprintable_are_not_accepted(name):
    assert not is_inside(name)


# Components and weights


def test_a_component_that_the_checkpoint_lacked_says_so(path):
    with pytest.raises(
        BundleError,
        match=r"expected component 'text_layer', got none. Its checkpoint lacked text_encoder and "
        "vae: export again from one that has it",
    ):
        Bundle.open(path).component("text_layer")


def test_an_unknown_component_of_a_complete_bundle_names_those_there_are(path):
    rewrite_manifest(path, lambda value: value.update(missing=[]))
    with pytest.raises(BundleError, match=r"expected component 'blok', got none. It has block."):
        Bundle.open(path).component("blok")


def test_an_unknown_form_names_those_there_are(path):
    with pytest.raises(
        BundleError, match="'block': expected form 'int8', got only fp32, fp16, bf16"
    ):
        Bundle.open(path).graph_path("block", "int8")
    assert Bundle.open(path).graph_path("block", "fp16") == path / "onnx/block.fp16.onnx"


@pytest.mark.parametrize(
    ("form", "dtype"), [("fp32", np.float32), ("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)]
)
def test_layer_weights_have_the_dtypes_of_the_graph(path, form, dtype):
    weights = Bundle.open(path).layer_weights("block", 1, form)
    assert list(weights) == ["w", "b"]
    assert weights["w"].dtype == dtype
    assert weights["b"].dtype == np.float32
    np.testing.assert_array_equal(weights["w"].astype(np.float32), WEIGHTS["w"] + 1)
    np.testing.assert_array_equal(weights["b"], WEIGHTS["b"])


def test_layer_weights_are_views_where_the_dtype_is_stored(path):
    weights = Bundle.open(path).layer_weights("block", 0, "fp16")
    assert not weights["b"].flags.owndata
    assert not weights["b"].flags.writeable
    assert weights["w"].flags.owndata


def replace_layer(path: Path, tensors: dict) -> Bundle:
    """Give layer 0 other tensors, and the manifest their size."""
    file = path / "weights/block.00.safetensors"
    save_file(tensors, file)
    size = file.stat().st_size
    rewrite_manifest(path, lambda v: v["files"]["weights/block.00.safetensors"].update(size=size))
    return Bundle.open(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": WEIGHTS["w"]}, r"got \[\] too many and without \['b'\]. Export the bundle again"),
        ({**WEIGHTS, "c": WEIGHTS["b"]}, r"got \['c'\] too many and without \[\]"),
        ({**WEIGHTS, "w": WEIGHTS["w"].T.copy()},
         r"tensor 'w': expected float16 \(2, 3\), got \(3, 2\)"),
        ({**WEIGHTS, "w": WEIGHTS["w"] * 1e5},
         "tensor 'w': expected values that fit float16, got 500000. Use the form bf16 or fp32"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_the_graph_are_refused(path, tensors, message):
    with pytest.raises(BundleError, match=message):
        replace_layer(path, tensors).layer_weights("block", 0, "fp16")


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_does_not_exist_is_refused(path, layer):
    with pytest.raises(ValueError, match=f"block: expected a layer from 0 to 1, got {layer}"):
        Bundle.open(path).layer_weights("block", layer, "fp32")


def test_only_files_of_the_manifest_are_mapped(path):
    bundle = Bundle.open(path)
    assert set(bundle.map_tensors("weights/block.00.safetensors")) == {"w", "b"}
    with pytest.raises(BundleError, match=r"expected file '\.\./x', got none in the manifest"):
        bundle.map_tensors("../x")


def test_a_reader_between_the_two_renames_of_a_writer_reads_again(path, monkeypatch):
    old, new = ((path / name).read_bytes() for name in ("manifest.json", "manifest.sha256"))
    reads = iter([b"the manifest before", new, old, new])
    monkeypatch.setattr(Path, "read_bytes", lambda self: next(reads))
    assert manifest_module.read_manifest(path)[0].family == "skyreels"
