"""`mc-bench compare`: what is judged, what is not and why, and reports that are none."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from mc_runtime.bench.cli import main
from mc_runtime.bench.compare import compare_reports, read_report
from mc_runtime.bench.schemas import read_schema

SCHEMA = read_schema("latency")
ENGINES = ("full pass, chunk 1", "full pass, chunk 2", "reuse step")


def make(schema: dict[str, Any]) -> Any:
    """The smallest value that follows a schema."""
    if "$ref" in schema:
        return make(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    for choices in ("anyOf", "oneOf", "enum"):
        if choices in schema:
            first = schema[choices][0]
            return make(first) if isinstance(first, dict) else first
    if "const" in schema:
        return schema["const"]
    kind = schema["type"] if isinstance(schema["type"], str) else schema["type"][0]
    if kind == "object":
        return {name: make(schema["properties"][name]) for name in schema.get("required", ())}
    if kind == "array":
        return [make(schema["items"]) for _ in range(schema.get("minItems", 0))]
    text = "ab" * 32 if "pattern" in schema else "text"
    return {"string": text, "boolean": False, "null": None}.get(kind, 1)


def entries(part: str, names: tuple[str, ...], samples, kernel) -> list[dict[str, Any]]:
    """Entries of a report with samples and times of the kernel, shape (names, rounds)."""
    item = make(SCHEMA["properties"][part]["items"])
    key = "name" if part == "engines" else "policy"
    return [
        item
        | {
            key: name,
            "samples_ms": np.asarray(mine).tolist(),
            "reference_ms": None if kernel is None else np.asarray(times).tolist(),
        }
        for name, mine, times in zip(
            names, samples, samples if kernel is None else kernel, strict=True
        )
    ]


def report(rounds: int = 30, seed: int = 0, noise: float = 0.02, **changes: Any) -> dict[str, Any]:
    """A report of three engines on a quiet machine."""
    rng = np.random.default_rng(seed)
    levels = np.array([[8.0], [10.0], [1.0]])
    samples, kernel = np.exp(noise * rng.standard_normal((2, 3, rounds))) * [levels, 0 * levels + 2]
    made = make(SCHEMA) | {"engines": entries("engines", ENGINES, samples, kernel)}
    return made | changes


def slow(made: dict[str, Any], name: str, factor: float = 1.1) -> dict[str, Any]:
    """The same with one engine slower."""
    changed = copy.deepcopy(made)
    for entry in changed["engines"]:
        if entry["name"] == name:
            entry["samples_ms"] = [factor * sample for sample in entry["samples_ms"]]
    return changed


def verdicts(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [row.verdict for row in compare_reports(before, after).rows]


def bench(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["compare", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_one_slower_engine_is_found_whatever_the_machines_speed(write) -> None:
    before = report()
    after = slow(report(seed=1), ENGINES[1])
    for entry in after["engines"]:
        for times in ("samples_ms", "reference_ms"):
            entry[times] = [1.5 * time for time in entry[times]]
    assert verdicts(before, after) == ["no change", "slower", "no change"]
    paths = write("a.json", before), write("b.json", after)
    text = bench(*paths, code=1)
    assert "hold together in 95 of 100 repetitions or more" in text
    assert "each sample over the reference kernel of its round." in text
    assert "The reference kernel took 1.50 times as long in the second report" in text
    assert compare_reports(before, report(seed=1)).notes == ()
    found = json.loads(bench(*paths, "--json", code=1))
    assert found["regressed"] and found["confidence"] == pytest.approx(0.95)


def test_the_kernel_is_that_of_the_round_so_that_one_time_of_it_matters_little() -> None:
    before, after = report(noise=0), report(noise=0)
    for number, entry in enumerate(after["engines"]):
        entry["reference_ms"][number::3] = [2.5] * len(entry["reference_ms"][number::3])
    assert verdicts(before, after) == ["no change"] * 3
    assert [row.change.ratio for row in compare_reports(before, after).rows] == [1] * 3


@pytest.mark.parametrize("kernel", [None, [None] * 30])
def test_beside_a_gpu_milliseconds_are_compared(kernel, write) -> None:
    before, after = report(), slow(report(seed=1), ENGINES[2])
    for made in (before, after):
        made["engines"][2]["reference_ms"] = kernel
    rows = compare_reports(before, after).rows
    assert [row.by_kernel for row in rows] == [True, True, False]
    assert [row.verdict for row in rows] == ["no change", "no change", "slower"]
    medians = [np.median(made["engines"][2]["samples_ms"]) for made in (before, after)]
    assert rows[2].change.ratio == pytest.approx(medians[1] / medians[0])


def test_only_rows_that_are_judged_widen_the_intervals() -> None:
    before, after = report(), report(seed=1)
    alone = [made | {"engines": made["engines"][:1]} for made in (before, after)]
    for made in (before, after):
        for entry in made["engines"][1:]:
            entry["samples_ms"], entry["reference_ms"] = (
                entry[times][:4] for times in ("samples_ms", "reference_ms")
            )
    compared = compare_reports(before, after)
    assert [row.verdict for row in compared.rows] == ["no change", *["too few samples"] * 2]
    assert any("--iterations" in note and "--rounds" in note for note in compared.notes)
    one = compare_reports(*alone).rows[0].change
    width = compared.rows[0].change.high - compared.rows[0].change.low
    assert width == pytest.approx(one.high - one.low, rel=0.1)
    assert compared.confidence == pytest.approx(0.95)


def test_five_samples_say_how_little_they_hold(write) -> None:
    names = tuple(f"pass {number}" for number in range(12))
    made = report(engines=entries("engines", names, np.ones((12, 5)), np.ones((12, 5))))
    assert compare_reports(made, made).confidence == pytest.approx(1 - 12 * 2 / 252)
    generations = entries("generation", ("none",), np.ones((1, 1)), np.ones((1, 1)))
    made = report(engines=[], generation=generations)
    compared = compare_reports(made, made)
    assert compared.confidence is None and compared.rows[0].verdict == "too few samples"
    path = write("a.json", made)
    assert "hold together" not in bench(path, path)


def test_nothing_is_judged_on_a_busy_machine(write) -> None:
    busy = slow(report(seed=1), ENGINES[1], 2.0)
    for entry in busy["engines"]:
        entry["reference_ms"][:16] = [2.6] * 16
    for pair in ((report(), busy), (busy, report())):
        assert verdicts(*pair) == ["busy machine"] * 3
    text = bench(write("a.json", report()), write("b.json", busy))
    assert "over 1.2 times as long as in the fastest" in text and "Measure again" in text
    hiccups = report(seed=1)  # of one engine in each round, as a short kernel has them
    for number in range(30):
        hiccups["engines"][number % 3]["reference_ms"][number] = 2.6
    assert verdicts(report(), hiccups) == ["no change"] * 3


def test_only_quiet_rounds_are_judged(write) -> None:
    """Beside another program an engine slowed down more than the kernel did."""
    disturbed = report(seed=1)
    for entry in disturbed["engines"]:
        entry["reference_ms"][::3] = [2.6] * 10
        entry["samples_ms"][::3] = [2 * sample for sample in entry["samples_ms"][::3]]
    assert verdicts(report(), disturbed) == ["no change"] * 3
    assert verdicts(report(), slow(disturbed, ENGINES[1])) == ["no change", "slower", "no change"]
    few = report(rounds=6, seed=1)
    for entry in few["engines"]:
        entry["reference_ms"][:2] = [2.6] * 2
    assert verdicts(report(), few) == ["too few samples"] * 3
    text = bench(write("a.json", report()), write("b.json", few))
    assert "Fewer than 5 samples of quiet rounds are not judged" in text


def test_what_else_was_asked_for_is_compared_name_by_name() -> None:
    before, after = report(), report()
    for made, threshold in ((before, 0.1), (after, 0.2)):
        made["run"] = {"prompt": "a", "policies": {"teacache": {"threshold": threshold}}}
        made["environment"] = {"cpu": "x", "versions": {"numpy": str(threshold)}}
    after["run"]["dtype"], after["partial"] = "fp16", True
    assert set(compare_reports(before, after).notes) == {
        "run: policies.teacache.threshold was 0.1, is 0.2.",
        "run: dtype was nothing, is fp16.",
        "environment: versions.numpy was 0.1, is 0.2.",
        "The second report is partial.",
    }


def test_a_report_that_follows_its_schema_is_read(write) -> None:
    made = report()
    jsonschema.validate(made, SCHEMA, cls=jsonschema.Draft202012Validator)
    assert read_report(write("a.json", made)) == made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "expected a report of mc-bench run --engines or --generation, got: Expecting"),
        ([1], "got: no object"),
        ({}, "expected schema motioncache.latency/v1, got None"),
        ({"schema": "motioncache.latency/v0"}, "got motioncache.latency/v0"),
        ({"schema": "motioncache.latency/v1"}, "got one in which $: 'created' is a required"),
        (report(engines=[{}]), "got one in which $.engines[0]: 'name' is a required"),
        (report(bundle=None), "$.bundle: None is not of type 'object'"),
        (slow(report(), ENGINES[0], float("nan")), "expected one that JSON has, got NaN"),
    ],
)
def test_what_is_no_report_is_refused(write, content, message) -> None:
    path = write("a.json", content)
    text = bench(path, write("b.json", report()), code=2)
    assert message in text and str(path) in text and "Measure again with this version" in text


def test_samples_without_their_kernel_are_refused(write) -> None:
    made = report()
    del made["engines"][1]["reference_ms"][0]
    path = write("a.json", made)
    assert "$.engines[1].reference_ms: is not as long as samples_ms" in bench(path, path, code=2)
