"""`mc-bench run` on a bundle of MAGI-1 with all of its parts, of random weights."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from mc_runtime.bench.backends import Backend
from mc_runtime.bench.cli import main
from mc_runtime.bench.roofline import EngineCosts
from mc_runtime.bench.schemas import read_schema
from mc_runtime.bench.sweep import list_cases
from mc_runtime.families.magi_schedule import MagiOptions, MagiSchedule
from mc_runtime.families.magi_work import plan_uncached
from mc_runtime.flops import ModelFlops, count_work
from mc_runtime.passes import HostPasses
from mc_runtime.pipeline import VideoPipeline

GOLDEN = Path(__file__).parent.parent / "golden"
CASE = GOLDEN / "magi-a"
PROMPT = "a cat walks on the grass"
GENERATING = ["--prompt", PROMPT, "--rounds", 1]
L, TEXT = 6 * 4 * 6, 64  # tokens of a chunk, the most of a prompt
TILE = 3, 8, 12  # latents of a tile: the whole picture
SHARES = {"75%": 108, "50%": 72, "40%": 58, "25%": 36, "10%": 15}
RULE = {"threshold": 0.06, "chunk_threshold": 0.03, "warmup_steps": 1, "coarse_steps": 5}
POLICY = ["--policies", "motioncache"]
for setting in RULE.items():
    POLICY += ["--policy-option", "motioncache.{}={}".format(*setting)]


@pytest.fixture(scope="module")
def bundle(whole_magi_bundle):
    return whole_magi_bundle


def bench(bundle, *arguments, code=0):
    result = CliRunner().invoke(main, ["run", str(bundle), *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def measure(kind, bundle, folder, *arguments):
    """What a run reported, after it was held against its schema."""
    file = folder / "report.json"
    bench(bundle, *arguments, "--threads", 1, "-o", file)
    report = json.loads(file.read_text())
    jsonschema.validate(report, read_schema(kind), cls=jsonschema.Draft202012Validator)
    return report


def test_policies_are_compared_with_the_work_that_the_plan_says(bundle, tmp_path):
    report = measure("policies", bundle, tmp_path, *GENERATING, *POLICY)
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
    report = measure("latency", bundle, tmp_path, "--generation", *GENERATING, *POLICY)
    assert [entry["policy"] for entry in report["generation"]] == ["none", "motioncache"]
    assert all(len(entry["chunks_ms"][0]) == 5 for entry in report["generation"])


def expected_passes(seen):
    """Tokens and keys of every pass, from the chunks that each place sees; most at the first."""
    first = next(iter(seen))
    passes = {f"full pass, {place}": (L, L * count) for place, count in seen.items()}
    for share, tokens in (SHARES | {"": 0}).items():
        name = f"{share} of the tokens, {first}" if share else "reuse step"
        passes[name] = tokens, L * seen[first]
    return passes


def test_everything_that_a_generation_runs_is_timed(bundle, tmp_path):
    report = measure("latency", bundle, tmp_path, "--engines", "--quick")
    timed = {entry["name"]: (entry["tokens"], entry["keys"]) for entry in report["engines"]}
    # The published ranges of the stages are 5, 4, 3 and 2 chunks.
    stages = {f"chunk {5 - lag}, stage {1 + lag}": 5 - lag for lag in range(4)}
    assert timed == expected_passes(stages | {"chunk 5, itself alone": 1}) | {
        "keys of a prompt": (TEXT, 0),
        "text encoder": (TEXT, 0),
        "VAE decoder, a tile": (math.prod(TILE), 0),
        "VAE encoder, a tile": (math.prod(TILE), 0),
    }
    assert all(len(entry["samples_ms"]) == 5 for entry in report["engines"])
    components = {entry["name"]: entry["component"] for entry in report["engines"]}
    assert components["reuse step"] == "embed"
    assert components["VAE decoder, a tile"] == "vae_decoder_block"


@pytest.mark.parametrize("case", ["magi-a", "magi-b"])
def test_passes_are_those_of_a_run(export, monkeypatch, case):
    """Chunk, what it sees, and the room of its branch's cache; distilled, and with guidance."""
    made = set()

    class Recording(HostPasses):
        def recompute(self, branch, chunk, x, rows, modulation, view):
            made.add((chunk, tuple(view.chunks), branch.capacity, len(rows)))
            return super().recompute(branch, chunk, x, rows, modulation, view)

    pipeline = VideoPipeline.from_bundle(export(GOLDEN / case, "magi"), threads=1)
    passes = Recording(pipeline.transformer)
    monkeypatch.setattr(VideoPipeline, "passes", passes)
    options = replace(pipeline.default_options, num_inference_steps=4)
    embedding = np.load(GOLDEN / case / "inputs.npz")["caption_embs"][0]
    silent = {"note": lambda _: None, "decode": False}
    pipeline.run(prompt_embeds=embedding, options=options, **silent)
    ran, length = set(made), pipeline.plan(options).shape.tokens
    cases = list_cases(Backend("cpu", pipeline), options, ["block", "embed"])
    flops = ModelFlops.from_manifest(pipeline.bundle.manifest.config["transformer"])
    text = pipeline.bundle.manifest.config["transformer"]["max_text_tokens"]
    for timed in cases:
        made.clear()
        timed.run()
        engines, cost = EngineCosts(flops, 0, 4, 4), timed.cost
        if timed.tokens:
            ((chunk, seen, kept, count),) = made
            assert (chunk, seen, kept, length) in ran
            assert (count, len(seen) * length) == (timed.tokens, timed.keys)
            engines = EngineCosts(flops, kept * length, 4, 4)
        blocks = flops.blocks(timed.tokens, timed.keys, text)
        counted = flops.embed(length) + blocks + flops.head(timed.tokens)
        assert cost.flops + cost.attention == counted
        expected = engines.embed(length)
        if timed.tokens:
            block = engines.block(timed.tokens, timed.keys, text)
            expected += block.times(flops.layers) + engines.head(timed.tokens)
        assert cost == expected


def test_a_tile_and_the_longest_prompt_are_coded_by_themselves(bundle):
    pipeline = VideoPipeline.from_bundle(bundle, threads=1)
    names = ["text_layer", "vae_decoder_block", "vae_encoder_block"]
    cases = list_cases(Backend("cpu", pipeline), pipeline.default_options, names)
    assert [case.component for case in cases] == names
    prompt, (frames,), (latents,) = (case.run() for case in cases)
    assert prompt.embedding.shape == (1, TEXT, 32) and prompt.tokens == TEXT
    assert frames.shape == (12, 64, 96, 3) and latents.shape == (*TILE, 8)
    larger = replace(pipeline.default_options, height=8 * 40, width=8 * 30)
    cases = list_cases(Backend("cpu", pipeline), larger, names[1:])
    assert [case.tokens for case in cases] == 2 * [3 * 32 * 30]


def test_a_component_of_the_other_family_is_refused(bundle):
    result = bench(bundle, "--engines", "--component", "vae_decoder_next", code=2)
    assert (
        "component: expected some of block, embed, context, text_layer, vae_decoder_block, "
        "vae_encoder_block, got vae_decoder_next." in result.stderr
    )


def test_what_is_not_there_yet_says_so(bundle):
    flags = ["--baseline", "diffusers", "--checkpoint", "x"]
    result = bench(bundle, *GENERATING, *flags, code=2)
    what = "mc-bench run --baseline diffusers"
    assert f"{what}: expected a bundle of another family, got one of magi" in result.stderr
