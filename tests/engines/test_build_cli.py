"""`mc-build`: engines in the bundle or beside it, none built twice, nothing broken by a crash."""

import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnx.helper as make
import pytest
from click.testing import CliRunner

from mc_engines import build_cli
from mc_engines.build_cli import main
from mc_engines.building import compile as compiling
from mc_engines.building import engines
from mc_engines.building.bounds import VideoLimits, bound_symbols
from mc_engines.building.compile import (
    Attention,
    Request,
    build_plan,
    has_fused_attention,
    make_log,
    name_targets,
)
from mc_engines.building.library import open_library
from mc_engines.building.network import find_silent_drops, has_softmax, parse_graph
from mc_engines.building.partition import Part
from mc_engines.building.store import EngineStore, hash_inputs
from mc_engines.bundle import Bundle
from mc_engines.bundle_additions import add_files, remove_files
from mc_engines.errors import BuildError, EngineError
from mc_engines.parity_report import allowed_error, find_rough
from mc_engines.specs import GraphSpec, TensorSpec
from mc_engines.verify import find_faults

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)")

SMALL = "--component", "combine", "--component", "embed"  # build in a tenth of a second
HALF = "--dtype", "fp16", "--allow-unfused"  # heads of 8 channels are too narrow to fuse


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny.bundle"))


@pytest.fixture(scope="module")
def library():
    return open_library("tensorrt-rtx")


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def read_files(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_engines_go_into_the_bundle_which_stays_valid_and_the_same_model(bundle: Path) -> None:
    before = Bundle.open(bundle)
    result = run(bundle, *SMALL)
    assert result.stdout.endswith(f"in {bundle}: compiled, not executed.\n")
    assert find_faults(bundle) == []
    after = Bundle.open(bundle)
    assert after.model_hash == before.model_hash and after.hash != before.hash
    added = set(after.manifest.files) - set(before.manifest.files)
    assert len(added) == 4 and all(name.startswith("engines/tensorrt-rtx-1.") for name in added)


def test_a_sidecar_says_what_its_engine_is(bundle: Path) -> None:
    run(bundle, "--component", "embed", "--sm", "86,80", "--dtype", "fp16")
    (sidecar,) = EngineStore(Bundle.open(bundle)).read()[0]
    plan = (bundle / sidecar.file).read_bytes()
    assert (sidecar.component, sidecar.form, sidecar.targets) == ("embed", "fp16", (80, 86))
    assert sidecar.size == len(plan) and sidecar.fused_attention is None
    assert sidecar.profiles == ({"patches": [[1, 1, 64], [1, 10200, 64], [1, 10200, 64]]},)


def test_the_newest_target_is_built_for(bundle: Path) -> None:
    run(bundle, "--component", "block", "--sm", "121")
    (sidecar,) = EngineStore(Bundle.open(bundle)).read()[0]
    assert sidecar.targets == (121,) and sidecar.fused_attention is True


def test_what_is_there_is_not_built_again(bundle: Path) -> None:
    run(bundle, *SMALL)
    files = read_files(bundle)
    run(bundle, *SMALL)
    assert read_files(bundle) == files
    run(bundle, *SMALL, "--height", 256)
    assert len(EngineStore(Bundle.open(bundle)).read()[0]) == 4


def test_the_library_is_not_asked_about_attention_that_it_has_built(bundle, monkeypatch) -> None:
    asked = []

    def ask(*arguments):
        asked.append(arguments[2:])
        return has_fused_attention(*arguments)

    monkeypatch.setattr(engines, "has_fused_attention", ask)
    arguments = bundle, "--component", "block", "--sm", "86"
    for options, count in [((), 1), ((), 1), (("--sm", "86,89"), 2), (("--dtype", "fp16"), 3)]:
        run(*arguments, *options)
        assert len(asked) == count
    (path,) = (path for path in bundle.glob("engines/*/block.fp16.*.engine"))
    path.unlink()  # as it cannot be told from one that is not there
    run(*arguments, "--dtype", "fp16")
    assert len(asked) == 4
    unfused = *arguments, "--dtype", "fp32"
    run(*unfused, "--allow-unfused")
    assert "expected attention of 2 heads" in run(*unfused, code=1).stderr


@pytest.mark.parametrize(
    "change",
    ["graph", "precision", "layers", "targets", "profiles", "workspace", "version", "flags"],
)
def test_everything_that_an_engine_is_made_from_is_in_its_key(library, tiny_bundle, change) -> None:
    """But not the file of measured times, which makes no other engine."""
    bundle = Bundle.open(tiny_bundle)

    def key(**changed):
        chosen = {"part": Part("block"), "form": "bf16", "library": library, "size": 64}
        chosen |= {"targets": (86,), "workspace": None, "times": None} | changed
        symbols = bound_symbols(bundle.manifest.config, VideoLimits(64, chosen["size"], 97, 5))
        request = Request(chosen["targets"], [symbols], chosen["workspace"], chosen["times"])
        return hash_inputs(bundle, chosen["part"], chosen["form"], chosen["library"], request)

    names = "__version__", "BuilderFlag", "ComputeCapability"
    module = {name: getattr(library.module, name) for name in names}
    changes = {
        "graph": {"part": Part("head")},
        "precision": {"form": "fp16"},
        "layers": {"part": Part("block", (0, 1))},
        "targets": {"targets": (89,)},
        "profiles": {"size": 96},
        "workspace": {"workspace": 1},
        "version": {"library": replace(library, module=SimpleNamespace(**module))},
        "flags": {"library": replace(library, module=SimpleNamespace(**module))},
    }
    if change == "version":
        changes["version"]["library"].module.__version__ = "1.7.1.117"
    if change == "flags":
        changes["flags"]["library"].module.BuilderFlag = SimpleNamespace()
    assert key() == key() == key(times=Path("times")) != key(**changes[change])


def test_an_engine_that_lost_its_end_is_built_again_in_a_folder(
    bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "engines"
    run(bundle, "--component", "embed", "--engines", folder)
    (sidecar,) = EngineStore(Bundle.open(bundle), folder).read()[0]
    path = folder / sidecar.file
    path.write_bytes(path.read_bytes()[:-1])
    run(bundle, "--component", "embed", "--engines", folder)
    assert path.stat().st_size >= sidecar.size


@pytest.mark.parametrize("ending", [".engine", ".engine.json"])
@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("clean", [(), ("--clean",)])
def test_an_engine_of_the_bundle_that_is_damaged_is_built_again(
    bundle: Path, ending, missing, clean
) -> None:
    run(bundle, *SMALL)
    (path,) = bundle.glob(f"engines/*/embed.*{ending}")
    if missing:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    (fault,) = find_faults(bundle)
    assert f"{path.name}: expected " in fault and fault.endswith(". Run mc-build again.")
    assert Bundle.open(bundle).manifest.files
    run(bundle, *SMALL, *clean)
    assert find_faults(bundle) == []
    store = EngineStore(Bundle.open(bundle))
    assert [each.component for each in store.read()[0]] == ["combine", "embed"]
    assert all(map(store.is_whole, store.read()[0]))


def test_damaged_engines_that_nobody_wants_are_removed(bundle: Path) -> None:
    run(bundle, *SMALL)
    for path in bundle.glob("engines/*/embed.*"):
        path.unlink()
    run(bundle, "--component", "combine", "--clean")
    assert find_faults(bundle) == []
    assert [each.component for each in EngineStore(Bundle.open(bundle)).read()[0]] == ["combine"]


def test_a_read_only_bundle_has_its_engines_elsewhere(bundle: Path, tmp_path: Path) -> None:
    files = read_files(bundle)
    run(bundle, *SMALL, "--engines", tmp_path / "engines")
    assert read_files(bundle) == files
    assert len(list((tmp_path / "engines").rglob("*.engine"))) == 2


def test_clean_keeps_what_was_asked_for(bundle: Path) -> None:
    run(bundle, *SMALL)
    run(bundle, "--component", "embed", "--clean")
    assert [each.component for each in EngineStore(Bundle.open(bundle)).read()[0]] == ["embed"]
    assert find_faults(bundle) == []


def test_clean_removes_what_is_damaged_and_says_so(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    run(bundle, *SMALL, "--engines", folder)
    combine, embed = EngineStore(Bundle.open(bundle), folder).read()[0]
    damaged, half = (folder / f"{combine.file}.json"), folder / embed.file
    damaged.write_bytes(b"{")
    half.with_name(f".{half.name}.new").write_bytes(b"half")
    alone = half.with_name("head.bf16.0.engine")
    alone.write_bytes(b"no sidecar")
    result = run(bundle, "--component", "embed", "--engines", folder, "--clean")
    for name in (f"{combine.file}.json", alone.relative_to(folder).as_posix()):
        assert f"Removed {name}: damaged, or left by a command that was inter" in result.stderr
    left = sorted(path.name for path in half.parent.iterdir())
    assert left == [half.name, f"{half.name}.json"]


def test_clean_removes_what_was_compiled_for_engines_that_are_gone(bundle: Path) -> None:
    run(bundle, *SMALL)
    engines = sorted(bundle.glob("engines/*/*.engine"))
    caches = [path.with_name(f"{path.name}.sm86.cache") for path in engines]
    for path in caches:
        path.write_bytes(b"compiled")
    run(bundle, "--component", "embed", "--clean")
    assert [path.name.split(".")[0] for path in caches if path.exists()] == ["embed"]
    assert find_faults(bundle) == []


@pytest.mark.parametrize("change", [{"layers": ["x"]}, {"left_out": None}, {"profiles": [1]}])
def test_a_sidecar_with_other_types_does_not_stop_clean(bundle: Path, tmp_path, change) -> None:
    folder = tmp_path / "engines"
    run(bundle, *SMALL, "--engines", folder)
    (path,) = folder.rglob("combine.*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    result = run(bundle, "--component", "embed", "--engines", folder, "--clean")
    assert f"{path.name}: damaged, or left by" in result.stderr
    assert len(list(folder.rglob("*.engine*"))) == 2


@pytest.mark.parametrize("content", [b"{}", b"[1, 2"])
def test_a_damaged_sidecar_in_a_bundle_is_built_again(bundle: Path, content: bytes) -> None:
    run(bundle, *SMALL)
    opened = Bundle.open(bundle)
    (file,) = (name for name in opened.manifest.files if "combine" in name and ".json" in name)
    remove_files(bundle, [file])
    add_files(bundle, {file: content})
    assert [each.component for each in EngineStore(opened).read()[0]] == ["embed"]
    assert EngineStore(opened).read()[1] == [file]
    run(bundle, "--component", "combine")
    assert {each.component for each in EngineStore(opened).read()[0]} == {"combine", "embed"}
    assert find_faults(bundle) == []


def test_an_interrupt_leaves_whole_engines_and_a_valid_bundle(bundle: Path, monkeypatch) -> None:
    def interrupt(library, graph, path, request, advance):
        if "embed" in path.name:
            raise KeyboardInterrupt
        return build_plan(library, graph, path, request, advance)

    monkeypatch.setattr(engines, "build_plan", interrupt)
    run(bundle, *SMALL, code=130)
    assert find_faults(bundle) == []
    assert [each.component for each in EngineStore(Bundle.open(bundle)).read()[0]] == ["combine"]


@pytest.fixture
def heard_interrupt():
    """Ctrl-C as a terminal sends it: a shell ignores it for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("place", ["log", "phase_start", "phase_finish"])
def test_an_interrupt_in_a_callback_that_the_library_swallows_ends_the_build(
    bundle: Path, monkeypatch, heard_interrupt, place
) -> None:
    """Whatever a callback raises, tensorrt_rtx 1.7.1 prints and goes on."""
    phases = []

    def press(make, *arguments):
        made = make(*arguments)
        base = type(made)

        def act(self, *given):
            if plans:
                phases.append(place)
                signal.raise_signal(signal.SIGINT)
            return getattr(base, place)(self, *given)

        if hasattr(base, place):
            made.__class__ = type(base.__name__, (base,), {place: act})
        return made

    for name in ("make_log", "make_monitor"):
        monkeypatch.setattr(compiling, name, partial(press, getattr(compiling, name)))
    plans = []

    def build(*arguments):
        plan = build_plan(*arguments)
        plans.append(plan)
        return plan

    monkeypatch.setattr(engines, "build_plan", build)
    before = signal.getsignal(signal.SIGINT)
    run(bundle, *SMALL, code=130)
    assert phases and len(plans) == 1 and signal.getsignal(signal.SIGINT) is before
    assert find_faults(bundle) == []
    assert [each.component for each in EngineStore(Bundle.open(bundle)).read()[0]] == ["combine"]


def test_an_interrupt_while_attention_is_asked_about_is_kept(
    library, monkeypatch, heard_interrupt
) -> None:
    class Log(type(make_log(library))):
        def log(self, severity, message):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(compiling, "make_log", lambda _: Log())
    with pytest.raises(KeyboardInterrupt):
        has_fused_attention(library, Attention(12, 128), "bf16", (86,))


def test_progress_can_cancel_a_build(library, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    symbols = bound_symbols(bundle.manifest.config, VideoLimits(64, 64, 97, 5))
    phases = []

    def advance(phase: str, step: int, steps: int) -> None:
        phases.append((phase, step, steps))
        if len(phases) == 2:
            raise RuntimeError("enough")

    graph, path = bundle.graph("block", "bf16"), bundle.graph_path("block", "bf16")
    with pytest.raises(RuntimeError, match="enough"):
        build_plan(library, graph, path, Request((86,), [symbols]), advance)
    assert all(0 < step <= steps for _, step, steps in phases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sm", "75"), "dtype: expected one that SM75 has, got bf16. Pass --dtype fp16 for it."),
        (
            ("--sm", "86,90"),
            "sm: expected some of 75, 80, 86, 89, 120, 121, got 90. tensorrt-rtx 1.7.1.116 has no "
            "such target: use --backend tensorrt on that GPU.",
        ),
        (("--height", "0"), "height: expected a multiple of 16, got 0. Use 16."),
        (("--width", "-16"), "width: expected a multiple of 16, got -16. Use 16."),
        (
            ("--causal-block-size", "-1"),
            "causal_block_size: expected at least 1, got -1. Raise it.",
        ),
        (("--sm", "x"), "sm: expected numbers with commas between, got 'x'. Write it like 86,89."),
        (
            ("--buckets", "1,.5"),
            "buckets: expected none, for tensorrt-rtx specialises one wide profile on the user's "
            "GPU, got 1,.5. Leave it out.",
        ),
        (
            ("--timing-cache", "times"),
            "timing_cache: expected none, for tensorrt-rtx times nothing ahead of time: its "
            "engines are finished on the user's GPU, got times. Leave it out.",
        ),
        (
            ("--partition", "baked"),
            "partition: expected shared or baked:N, got baked. Write it like baked:5.",
        ),
        (
            ("--partition", "baked:3"),
            "partition: expected groups of 1 to 2 layers, got 3. Give another number.",
        ),
        (
            ("--component", "timestep"),
            "component: expected one that runs on a GPU, got timestep, which runs once per run on "
            "the host. Leave it out.",
        ),
    ],
)
def test_wrong_usage_says_what_to_do(bundle: Path, arguments, message) -> None:
    assert run(bundle, *arguments, code=2).stderr == f"{message}\n"
    assert "engines" not in {path.name for path in bundle.iterdir()}


def test_groups_of_layers_have_their_weights_inside(bundle: Path) -> None:
    arguments = bundle, "--component", "block", "--sm", "86"
    run(*arguments)
    result = run(*arguments, "--partition", "baked:1")
    assert result.stdout.startswith("block.00-00") and "\nblock.01-01 " in result.stdout
    shared, first, second = sorted(
        EngineStore(Bundle.open(bundle)).read()[0], key=lambda x: x.layers
    )
    assert [each.layers for each in (shared, first, second)] == [(), (0,), (1,)]
    assert "qkv.weight" in shared.profiles[0] and "qkv.weight" not in first.profiles[0]
    assert "k_cache.0" in first.profiles[0] and first.fused_attention is True
    assert first.attention_kernels == 2 and "is one kernel; kernels seen: 2\n" in result.stdout
    weights = Bundle.open(bundle).layer_weights("block", 0, "bf16")
    assert first.size > sum(array.nbytes for array in weights.values() if array.ndim > 1)
    assert len({each.graph for each in (shared, first, second)}) == 3
    assert find_faults(bundle) == []
    run(*arguments, "--partition", "baked:2", "--clean")
    (both,) = EngineStore(Bundle.open(bundle)).read()[0]
    assert both.layers == (0, 1) and "block.00-01.bf16" in both.file


def test_the_help_says_that_generation_runs_no_groups() -> None:
    shown = " ".join(run("--help").output.split())
    assert "their weights inside, which mc-generate does not run." in shown


def test_attention_that_is_not_one_kernel_is_refused_or_asked_for(bundle: Path, tmp_path) -> None:
    arguments = bundle, "--component", "block", "--dtype", "fp32", "--sm", "86"
    assert run(*arguments, code=1).stderr == (
        "block: expected attention of 2 heads of 32 to be one kernel in fp32 on SM86, got none. "
        "Use --dtype bf16 or fp16, or build it nevertheless with --allow-unfused.\n"
    )
    result = run(*arguments, "--allow-unfused", "--engines", tmp_path / "engines")
    assert "attention may be in parts" in result.stdout


def test_what_cannot_be_built_for_a_target_is_left_out_of_it_and_listed(bundle, tmp_path) -> None:
    """A layer of the text encoder has products of float32 matrices, which SM75 does not have."""
    folder = tmp_path / "engines"
    arguments = bundle, *HALF, "--sm", "75,86", "--engines", folder
    result = run(*arguments)
    sidecars = {each.component: each for each in EngineStore(Bundle.open(bundle), folder).read()[0]}
    assert len(sidecars) == 12, "fp16 is too rough for the first step of its decoder"
    assert sidecars["text_layer"].targets == (86,)
    assert sidecars["block"].targets == (75, 86) and not sidecars["block"].left_out
    (reason,) = sidecars["text_layer"].left_out.items()
    assert reason[0] == "75" and "FP32 GEMM is not supported" in reason[1]
    assert f"Left out: text_layer for SM75: {reason[1]}\n" in result.stdout
    assert sidecars["vae_decoder_next"].fused_attention is False
    assert "attention may be in parts" in result.stdout
    files = read_files(folder)
    assert run(*arguments).stdout.split("\n")[-3:] == result.stdout.split("\n")[-3:]
    assert read_files(folder) == files


def test_too_little_scratch_memory_is_said_to_be_what_may_be_missing(bundle: Path) -> None:
    refused = run(bundle, "--component", "head", "--sm", "86", "--workspace", 1, code=1).stderr
    assert refused.startswith("head.bf16.onnx: expected an engine for SM86, got: ")
    assert ". Raise --workspace if memory is what it lacks. Leave out " in refused


def test_what_was_asked_for_by_name_is_not_left_out(bundle: Path, monkeypatch) -> None:
    arguments = *HALF, "--component", "text_layer"
    refused = run(bundle, *arguments, "--sm", "75,86", code=1).stderr
    assert refused.startswith("text_layer.fp16.onnx: expected an engine for SM75, got: ")
    assert refused.endswith("Leave out the target or the dtype that it names.\n")
    run(bundle, *arguments, "--sm", "86")
    with monkeypatch.context() as all_of_it:  # as a build of everything leaves it
        all_of_it.setattr(build_cli, "_choose_components", lambda *_: ["text_layer"])
        run(bundle, *HALF, "--sm", "75,86")
    assert run(bundle, *arguments, "--sm", "75,86", code=1).stderr == refused


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ("combine", "combine.bf16.onnx: expected an engine for SM86, got none. Stop."),
        ("motion", "motion.bf16.onnx: expected an engine for SM86, got none. Stop."),
        ("text_norm", None),
    ],
)
def test_a_required_component_fails_naming_the_target(bundle, monkeypatch, bad, expected) -> None:
    def refuse(library, graph, path, request, advance):
        if path.name.startswith(bad) and 86 in request.targets:
            targets = name_targets(request.targets)
            raise BuildError(f"{path.name}: expected an engine for {targets}, got none. Stop.")
        return build_plan(library, graph, path, request, advance)

    monkeypatch.setattr(engines, "build_plan", refuse)
    monkeypatch.setattr(build_cli, "_choose_components", lambda *_: ["embed", bad])
    result = run(bundle, "--sm", "80,86,89", code=0 if expected is None else 1)
    assert result.stderr == ("" if expected is None else f"{expected}\n")
    (*_, last) = EngineStore(Bundle.open(bundle)).read()[0]
    targets = (80, 86, 89) if expected else (80, 89)
    assert (last.component, last.targets) == ("embed" if expected else bad, targets)


def test_what_the_model_is_no_good_at_in_a_type_is_left_out_unless_named(
    bundle: Path, monkeypatch
) -> None:
    monkeypatch.setattr(engines, "find_rough", lambda _, form: {"text_norm": 0.63, "combine": 0.5})
    monkeypatch.setattr(build_cli, "_choose_components", lambda *_: ["combine", "text_norm"])
    result = run(bundle)
    assert [each.component for each in EngineStore(Bundle.open(bundle)).read()[0]] == ["combine"]
    assert (
        "Left out: text_norm: in bf16 it errs by 0.63 of its largest value, as the model itself "
        "does in torch; ONNX Runtime runs it in fp32. --component text_norm builds it "
        "nevertheless.\n"
    ) in result.stdout
    assert "Left out" not in run(bundle, "--component", "text_norm").stdout
    assert len(EngineStore(Bundle.open(bundle)).read()[0]) == 2


def test_what_is_rough_is_read_from_the_report_of_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    rows = [
        {"component": name, "form": form, "max_abs": error, "scale": 2, "tolerance": 0.1}
        | {"own_error": own}
        for name, form, error, own in [
            ("a", "bf16", 0.5, 0.4),
            ("a", "bf16", 1.0, 0.9),
            ("a", "fp16", 0.1, None),
            ("b", "bf16", 0.1, None),
        ]
    ]
    rows[1]["tolerance"] = 0.9
    (tmp_path / "reports/parity.json").write_text(json.dumps(rows))
    files = {"reports/parity.json": None}
    bundle = SimpleNamespace(path=tmp_path, manifest=SimpleNamespace(files=files))
    assert find_rough(bundle, "bf16") == {"a": 0.5} and find_rough(bundle, "fp16") == {}
    assert [allowed_error(bundle, name, "bf16") for name in "abc"] == [0.9, 0.1, 0]
    files.clear()
    assert find_rough(bundle, "bf16") == {}


def test_what_cannot_be_built_for_any_target_has_no_engine(bundle: Path, monkeypatch) -> None:
    monkeypatch.setattr(build_cli, "_choose_components", lambda *_: ["text_layer"])
    result = run(bundle, *HALF, "--sm", "75")
    assert result.stdout.startswith("Left out: text_layer for SM75: text_layer.fp16.onnx: expected")
    assert "0 engines of tensorrt-rtx" in result.stdout and find_faults(bundle) == []


@pytest.mark.parametrize(
    ("attention", "precision", "fused"),
    [
        (Attention(12, 128), "bf16", True),
        (Attention(3, 64), "fp16", True),
        (Attention(64, 64, mask=True), "bf16", True),
        (Attention(12, 128), "fp32", False),
        (Attention(1, 384), "bf16", False),
    ],
)
def test_fused_attention_is_known_by_building_it(library, attention, precision, fused) -> None:
    assert has_fused_attention(library, attention, precision, (80, 86, 89, 120)) is fused


def test_a_graph_of_other_types_is_refused(library, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    path = bundle.graph_path("embed", "fp16")
    with pytest.raises(EngineError) as error:
        parse_graph(library, make_log(library), bundle.graph("embed", "bf16"), path)
    assert str(error.value) == (
        "embed.fp16.onnx: expected the inputs 'patches' bfloat16 (1, L, 64), got 'patches' float16 "
        "(1, L, 64). Export the bundle again."
    )


def save_graph(path: Path, nodes, inputs, outputs) -> Path:
    graph = make.make_graph(nodes, "g", inputs, outputs)
    opsets = [make.make_opsetid("", 24)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def value(name: str, dtype: int, *shape: int | str):
    return make.make_tensor_value_info(name, dtype, shape)


def test_what_the_parser_would_drop_is_refused(library, tmp_path: Path) -> None:
    half = onnx.TensorProto.FLOAT16
    tensors = [value(name, half, 1, 2, 8, 16) for name in "qkv"]
    lengths = value("lengths", onnx.TensorProto.INT64, 1)
    node = make.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["y"])
    path = save_graph(
        tmp_path / "a.onnx", [node], [*tensors, lengths], [value("y", half, 1, 2, 8, 16)]
    )
    assert find_silent_drops(path) == ["Attention with lengths, which is dropped"]
    spec = GraphSpec("a.onnx", (), ())
    with pytest.raises(EngineError) as error:
        parse_graph(library, make_log(library), spec, path)
    assert str(error.value) == (
        "a.onnx: expected operators that tensorrt-rtx computes as they stand, got Attention with "
        "lengths, which is dropped. Export the bundle again with this version."
    )


def test_an_attribute_that_the_parser_would_drop_is_named(tmp_path: Path) -> None:
    half = onnx.TensorProto.FLOAT16
    tensors = [value(name, half, 1, 2, 8, 16) for name in "qkvy"]
    for mode, faults in (
        (3, ["Attention with qk_matmul_output_mode, which is dropped"]),
        (None, []),
    ):
        given = {} if mode is None else {"qk_matmul_output_mode": mode}
        node = make.make_node("Attention", ["q", "k", "v"], ["y"], **given)
        path = save_graph(tmp_path / "a.onnx", [node], tensors[:3], tensors[3:])
        assert find_silent_drops(path) == faults


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": ("z", "bfloat16", (1, "L", 64))}, "expected the inputs 'z' bfloat16"),
        ({"inputs": ("patches", "bfloat16", (1, "Q", 64))}, "expected the inputs 'patches' bfloat"),
        ({"inputs": ("patches", "bfloat16", (1, "L", 32))}, "(1, L, 32), got 'patches' bfloat16"),
        ({"outputs": ("x", "float32", (1, "L", 64))}, "expected the outputs 'x' float32"),
        ({"outputs": ("z", "bfloat16", (1, "L", 64))}, "expected the outputs 'z' bfloat16"),
    ],
)
def test_a_graph_of_other_tensors_is_refused(library, tiny_bundle: Path, changes, said) -> None:
    bundle = Bundle.open(tiny_bundle)
    sides = {side: (TensorSpec(*spec),) for side, spec in changes.items()}
    graph = replace(bundle.graph("embed", "bf16"), **sides)
    with pytest.raises(EngineError) as error:
        parse_graph(library, make_log(library), graph, bundle.graph_path("embed", "bf16"))
    assert said in str(error.value) and str(error.value).endswith("Export the bundle again.")


@pytest.mark.parametrize(
    ("island", "kind"), [(False, "bfloat16"), (False, "float16"), (True, "bfloat16")]
)
def test_a_product_between_casts_is_not_of_16_bits(library, tmp_path: Path, island, kind) -> None:
    """Inputs and outputs have the type that was asked for; what is between them has not."""
    to = {"bfloat16": onnx.TensorProto.BFLOAT16, "float16": onnx.TensorProto.FLOAT16}[kind]
    nodes = [
        *(make.make_node("Cast", [name], [f"{name}1"], to=onnx.TensorProto.FLOAT) for name in "xw"),
        make.make_node("MatMul", ["x1", "w1"], ["y1"], name="wide"),
        make.make_node("Cast", ["y1"], ["y"], to=to),
    ]
    if island:
        nodes[2].metadata_props.add(key="island", value="component")
    tensors = [value(name, to, 16, 16) for name in "xwy"]
    path = save_graph(tmp_path / "m.onnx", nodes, tensors[:2], tensors[2:])
    x, w, y = (TensorSpec(name, kind, (16, 16)) for name in "xwy")
    spec = GraphSpec("m.onnx", (x, w), (y,))
    if island:
        parse_graph(library, make_log(library), spec, path)
        return
    with pytest.raises(EngineError) as error:
        parse_graph(library, make_log(library), spec, path)
    assert str(error.value) == (
        "m.onnx: expected at most 0 products of float32 in a graph of 16 bits, got 1: wide. "
        "Export the bundle again."
    )


def test_kernels_that_are_not_seen_are_unknown(bundle: Path, monkeypatch) -> None:
    monkeypatch.setattr(engines, "count_attention_kernels", lambda plan: None)
    shown = run(bundle, "--component", "block", "--sm", "86").stdout
    assert "attention is one kernel; kernels seen: unknown\n" in shown


def test_an_operator_that_needs_a_plugin_is_named(tmp_path: Path) -> None:
    node = make.make_node("NonZero", ["x"], ["y"])
    x, y = value("x", onnx.TensorProto.FLOAT, 4), value("y", onnx.TensorProto.INT64, 1, "n")
    path = save_graph(tmp_path / "n.onnx", [node], [x], [y])
    assert find_silent_drops(path) == ["NonZero, which needs a plugin"]


@pytest.mark.parametrize("where", ["branch", "function"])
def test_what_would_be_dropped_is_found_inside_of_branches_and_functions(tmp_path, where) -> None:
    """Both are graphs of their own, which the file's main graph refers to."""
    node = make.make_node("NonZero", ["x"], ["y"])
    x, y = value("x", onnx.TensorProto.FLOAT, 4), value("y", onnx.TensorProto.INT64, 1, "n")
    softmax = make.make_node("Softmax", ["x"], ["z"])
    functions = []
    if where == "branch":
        inner = make.make_graph([node, softmax], "inner", [], [y])
        deeper = make.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
        outer = make.make_graph([deeper], "outer", [], [y])
        node = make.make_node("If", ["c"], ["y"], then_branch=outer, else_branch=outer)
    else:
        opsets = [make.make_opsetid("", 20)]
        functions = [make.make_function("own", "Find", ["x"], ["y"], [node, softmax], opsets)]
        node = make.make_node("Find", ["x"], ["y"], domain="own")
    condition = value("c", onnx.TensorProto.BOOL)
    graph = make.make_graph([node], "g", [x, condition], [y])
    onnx.save(make.make_model(graph, functions=functions), tmp_path / "n.onnx")
    assert set(find_silent_drops(tmp_path / "n.onnx")) == {"NonZero, which needs a plugin"}
    assert has_softmax(tmp_path / "n.onnx")


def test_a_graph_that_cannot_be_parsed_names_the_operator(library, tmp_path: Path) -> None:
    node = make.make_node("NoSuchThing", ["x"], ["y"], domain="nowhere")
    x, y = (value(name, onnx.TensorProto.FLOAT, 4) for name in "xy")
    graph = make.make_graph([node], "g", [x], [y])
    opsets = [make.make_opsetid("", 20), make.make_opsetid("nowhere", 1)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "x.onnx")
    tensors = (TensorSpec("x", "float32", (4,)),), (TensorSpec("y", "float32", (4,)),)
    with pytest.raises(
        BuildError, match=r"^x\.onnx: expected a graph that tensorrt-rtx .*NoSuchTh"
    ):
        parse_graph(library, make_log(library), GraphSpec("x.onnx", *tensors), tmp_path / "x.onnx")
