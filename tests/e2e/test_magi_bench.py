"""`mc-bench run` on a bundle of MAGI-1 with a text encoder, of random weights."""

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner
from magi_parts import write_t5

from mc_runtime.bench.cli import main
from mc_runtime.bench.schemas import read_schema
from mc_runtime.families.magi_schedule import MagiOptions, MagiSchedule
from mc_runtime.families.magi_work import plan_uncached
from mc_runtime.flops import ModelFlops, count_work
from mc_runtime.pipeline import VideoPipeline

CASE = Path(__file__).parent.parent / "golden" / "magi-a"
PROMPT = "a cat walks on the grass"
RULE = {"threshold": 0.06, "chunk_threshold": 0.03, "warmup_steps": 1, "coarse_steps": 5}
POLICY = ["--policies", "motioncache"]
for setting in RULE.items():
    POLICY += ["--policy-option", "motioncache.{}={}".format(*setting)]


@pytest.fixture(scope="module")
def bundle(export, tmp_path_factory):
    checkpoint = shutil.copytree(CASE, tmp_path_factory.mktemp("magi") / "with-t5")
    write_t5(checkpoint)
    return export(checkpoint, "magi")


def bench(bundle, *arguments, code=0):
    result = CliRunner().invoke(main, ["run", str(bundle), *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def measure(kind, bundle, folder, *arguments):
    """What a run reported, after it was held against its schema."""
    file = folder / "report.json"
    bench(bundle, *arguments, "--prompt", PROMPT, "--rounds", 1, "--threads", 1, "-o", file)
    report = json.loads(file.read_text())
    jsonschema.validate(report, read_schema(kind), cls=jsonschema.Draft202012Validator)
    return report


def test_policies_are_compared_with_the_work_that_the_plan_says(bundle, tmp_path):
    report = measure("policies", bundle, tmp_path, *POLICY)
    pipeline = VideoPipeline.from_bundle(bundle, threads=1)
    options, config = pipeline.default_options, pipeline.bundle.manifest.config
    assert isinstance(options, MagiOptions)
    prompt = pipeline.embed_text("prompt", PROMPT, lambda _: None).shape[1]
    (table,) = pipeline.bundle.map_tensors("weights/null_text.safetensors").values()
    uncached = plan_uncached(
        MagiSchedule.from_manifest(config, options), pipeline.plan(options), [prompt], len(table)
    )
    flops = ModelFlops.from_manifest(config["transformer"])
    none, cached = report["policies"]
    expected = count_work(flops, uncached, padded=False).to_json()
    assert none["flops"] == report["baseline_flops"]["chunk_causal"] == expected
    assert report["baseline_flops"]["every_chunk_every_row"] is None
    assert cached["flops_ratio"] == {
        "every_chunk_every_row": None,
        "chunk_causal": expected["total"] / cached["flops"]["total"],
    }
    assert cached["flops_ratio"]["chunk_causal"] > 1 and cached["reuse_ratio"] > 0.1
    assert report["settings"]["nearly_clean"] is True


def test_whole_videos_are_timed(bundle, tmp_path):
    report = measure("latency", bundle, tmp_path, "--generation", *POLICY)
    assert [entry["policy"] for entry in report["generation"]] == ["none", "motioncache"]
    assert all(len(entry["chunks_ms"][0]) == 5 for entry in report["generation"])


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--engines"], "mc-bench run --engines"),
        (
            ["--prompt", PROMPT, "--baseline", "diffusers", "--checkpoint", "x"],
            "mc-bench run --baseline diffusers",
        ),
    ],
)
def test_what_is_not_there_yet_says_so(bundle, arguments, what):
    result = bench(bundle, *arguments, code=2)
    assert f"{what}: expected a bundle of another family, got one of magi" in result.stderr
