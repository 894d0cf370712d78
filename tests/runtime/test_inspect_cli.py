"""What mc-inspect prints, and that it finds damage."""

import json

import pytest
from click.testing import CliRunner

from mc_engines.bundle import Bundle
from mc_engines.bundle_writer import BundleWriter
from mc_engines.manifest import Manifest
from mc_engines.specs import ComponentSpec, GraphSpec, TensorSpec
from mc_runtime.inspect_cli import main

PARITY = [
    {"component": "block", "form": "fp32", "layer": layer, "output": output, "max_abs": error,
     "mean_abs": error / 10, "cosine": 1 - error, "scale": scale, "tolerance": 1e-4}
    for layer, output, error, scale in [
        (0, "y", 1e-5, 1.0), (1, "y", 2e-5, 1.0), (0, "k_new", 3e-5, 10.0)]
]  # fmt: skip


def tensors(form: str) -> GraphSpec:
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[form]
    return GraphSpec(
        f"onnx/block.{form}.onnx",
        inputs=(TensorSpec("x", dtype, (1, "K", 64)), TensorSpec("kv_map", "int32", ("M",))),
        outputs=(TensorSpec("y", dtype, (1, "K", 64)),),
        weights=(TensorSpec("w", dtype, (64, 64)),),
    )


@pytest.fixture
def path(tmp_path):
    files = {
        "onnx/block.fp32.onnx": 1500, "onnx/block.bf16.onnx": 2500, "onnx/head.fp32.onnx": 10,
        "onnx/head.onnx.data": 7000, "weights/block.00.safetensors": 40_000,
        "weights/block.01.safetensors": 40_000,
    }  # fmt: skip
    block = ComponentSpec(
        "block",
        {form: tensors(form) for form in ("fp32", "bf16")},
        ("weights/block.00.safetensors", "weights/block.01.safetensors"),
    )
    head = ComponentSpec("head", {"fp32": GraphSpec("onnx/head.fp32.onnx", (), ())})
    config = {"transformer": {"layers": 2, "patch_size": [1, 2, 2]}}
    with BundleWriter(tmp_path / "bundle") as writer:
        for file, size in files.items():
            (writer.folder / file).parent.mkdir(exist_ok=True)
            (writer.folder / file).write_bytes(bytes(size))
        (writer.folder / "reports").mkdir()
        (writer.folder / "reports/parity.json").write_text(json.dumps(PARITY))
        writer.finish(
            Manifest(
                "skyreels", "skyreels-df-1.3b-540p", "bfloat16", ("vae", "tokenizer"), config,
                {"block": block, "head": head}, {"fast": {}, "slow": {}}, tool_version="0.0.7",
            )
        )  # fmt: skip
    return tmp_path / "bundle"


def inspect(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def rows(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines() if line.strip()]


def test_shows_what_the_bundle_is(path):
    result = inspect(path)
    assert (result.exit_code, result.stderr) == (0, "")
    shown = {row[0]: " ".join(row[1:]) for row in rows(result.stdout)}
    assert shown["family"] == "skyreels"
    assert shown["model"] == "skyreels-df-1.3b-540p"
    assert shown["weights"] == "bfloat16"
    assert shown["missing"] == "vae, tokenizer"
    assert shown["presets"] == "fast, slow"
    assert shown["files"].startswith("7, 9")  # 91 kB and the report
    assert shown["hash"] == Bundle.open(path).hash
    assert shown["transformer"] == "layers 2, patch_size [1, 2, 2]"
    assert "written by motioncache 0.0.7" in " ".join(result.stdout.split())


def test_shows_every_tensor_in_every_form(path):
    shown = rows(inspect(path).stdout)
    assert "block, 2 layers, 80.0 kB of weights".split() in shown
    assert "tensor shape fp32 (1.5 kB) bf16 (2.5 kB)".split() in shown
    assert "in x 1, K, 64 float32 bfloat16".split() in shown
    assert "in kv_map M int32 int32".split() in shown
    assert "out y 1, K, 64 float32 bfloat16".split() in shown
    assert "head, 7.0 kB of weights".split() in shown


def test_shows_the_worst_error_of_each_component(path):
    assert "block fp32 3 2e-05 0.0001 0.999970".split() in rows(inspect(path).stdout)


def test_quiet_shows_nothing(path):
    result = inspect(path, "--quiet", "--verify")
    assert (result.exit_code, result.output) == (0, "")


def test_json_is_the_manifest_with_its_sums(path):
    value = json.loads(inspect(path, "--json").stdout)
    bundle = Bundle.open(path)
    assert value["manifest"] == bundle.manifest.to_json()
    assert value["hash"] == bundle.hash
    assert value["total_files"] == 7
    report = (path / "reports/parity.json").stat().st_size
    assert value["total_bytes"] == 1500 + 2500 + 10 + 7000 + 80_000 + report
    assert value["weight_bytes"] == {"block": 80_000, "head": 7000}
    assert value["parity"] == PARITY


def test_a_bundle_without_a_report_has_none(tmp_path):
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.finish(Manifest("skyreels", None, "float32", (), {}, {}))
    result = inspect(tmp_path / "bundle")
    assert result.exit_code == 0
    assert "not a published configuration" in result.stdout
    assert "parity" not in result.stdout
    assert json.loads(inspect(tmp_path / "bundle", "--json").stdout)["parity"] == []


def test_verify_says_that_a_sound_bundle_is_sound(path):
    result = inspect(path, "--verify")
    assert result.exit_code == 0
    assert result.stdout.endswith("Verified: all 7 files are as the manifest says.\n")


def test_verify_lists_all_faults_and_exits_1(path):
    (path / "onnx/head.onnx.data").write_bytes(b"\1" + bytes(6999))
    (path / "weights/block.01.safetensors").unlink()
    (path / "foreign").touch()
    result = inspect(path, "--verify")
    assert (result.exit_code, result.stdout) == (1, "")
    faults = result.stderr.splitlines()
    assert len(faults) == 4
    assert "weights/block.01.safetensors: expected 40000 bytes, got no file." in faults[0]
    assert "onnx/head.onnx.data: expected sha256" in faults[1]
    assert "foreign: expected only files of the manifest, got another." in faults[2]
    assert faults[3] == f"{path}: faults found: 3."


def test_verify_as_json_lists_the_faults_for_programs(path):
    (path / "foreign").touch()
    result = inspect(path, "--verify", "--json")
    assert result.exit_code == 1
    faults = json.loads(result.stdout)["faults"]
    assert [fault.split(": ")[1] for fault in faults] == ["foreign"]


def test_a_damaged_bundle_is_not_shown(path):
    (path / "manifest.json").write_bytes(b"{}")
    for arguments in ([], ["--verify"], ["--json"]):
        result = inspect(path, *arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "manifest.sha256: expected '" in result.stderr


def test_no_bundle_is_a_failure_and_no_argument_wrong_usage(tmp_path):
    assert inspect(tmp_path / "none").exit_code == 1
    assert inspect().exit_code == 2


def test_names_with_the_signs_of_markup_are_shown_as_they_are(path):
    path.rename(path.parent / "[red]x")
    assert "[red]x" in inspect(path.parent / "[red]x").stdout
