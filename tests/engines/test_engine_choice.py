"""Which engine can run here: each way in which one cannot, and that the command it names helps."""

import hashlib
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mc_engines import build_cli
from mc_engines.building import engines
from mc_engines.building.bounds import VideoLimits, bound_symbols, bucket_symbols
from mc_engines.building.compile import Request
from mc_engines.building.partition import Part, graph_hash, graph_of
from mc_engines.building.store import EngineStore, Sidecar
from mc_engines.bundle import Bundle
from mc_engines.engine_choice import Place, choose_engine, find_hindrance, read_plan
from mc_engines.errors import EngineError

BLOCK = Part("block")
HERE = Place("tensorrt-rtx", "1.7.1.116", 86, "bf16", VideoLimits(64, 96, 97, 5))
PLAN = b"a plan"


@pytest.fixture
def store(tiny_bundle: Path, tmp_path: Path) -> EngineStore:
    return EngineStore(Bundle.open(tiny_bundle), tmp_path / "my engines")


def make(
    store: EngineStore, place: Place = HERE, part: Part = BLOCK, shares=(), **changes
) -> Sidecar:
    """A sidecar as mc-build writes it for a place, but for some changes."""
    symbols = bound_symbols(store.bundle.manifest.config, place.limits)
    profiles = [bucket_symbols(symbols, share) for share in shares] or [symbols]
    sidecar = Sidecar(
        component=part.component,
        layers=part.layers,
        form=place.form,
        backend=place.backend,
        version=place.version,
        targets=(80, 86),
        left_out={},
        profiles=tuple(Request((), profiles).bound(graph_of(store.bundle, part, place.form))),
        graph=graph_hash(store.bundle, part, place.form),
        inputs=hashlib.sha256(repr((place, changes)).encode()).hexdigest(),
        fused_attention=True,
        attention_kernels=2,
        size=len(PLAN),
        sha256=hashlib.sha256(PLAN).hexdigest(),
        seconds=1.0,
    )
    return replace(sidecar, **changes)


def add(store: EngineStore, sidecar: Sidecar) -> Sidecar:
    store.add(sidecar, PLAN)
    return sidecar


def refusal(store: EngineStore, part: Part = BLOCK, place: Place = HERE) -> str:
    with pytest.raises(EngineError) as error:
        choose_engine(store, part, place)
    return str(error.value)


def command(store: EngineStore) -> str:
    return (
        f"Run: mc-build {store.bundle.path} --backend tensorrt-rtx --sm 86 --dtype bf16 "
        f"--height 64 --width 96 --max-frames 97 --causal-block-size 5 --engines '{store.folder}'"
    )


def test_an_engine_that_fits_is_found_and_read(store) -> None:
    sidecar = add(store, make(store))
    found = choose_engine(store, BLOCK, HERE)
    assert found.file == sidecar.file
    assert read_plan(store, found, HERE) == PLAN


def test_of_several_the_one_for_the_smallest_video_is_taken(store) -> None:
    small = add(store, make(store))
    for limits in (VideoLimits(128, 96, 97, 5), VideoLimits(64, 96, 193, 5)):
        add(store, make(store, replace(HERE, limits=limits)))
    assert choose_engine(store, BLOCK, HERE).file == small.file
    wide = replace(HERE, limits=VideoLimits(96, 96, 97, 5))
    assert choose_engine(store, BLOCK, wide).profiles[0]["x"][2] == [1, 5 * 8 * 6, 64]


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"backend": "tensorrt"}, "one of tensorrt"),
        ({"version": "1.6.0.3"}, "one of version 1.6.0.3"),
        ({"targets": (80, 89)}, "one for SM80, SM89"),
        ({"graph": "0" * 64}, "one of another graph"),
    ],
)
def test_what_differs_is_told_with_the_command_that_makes_another(store, changes, got) -> None:
    add(store, make(store, **changes))
    expected = "block.bf16: expected an engine of tensorrt-rtx 1.7.1.116 for SM86"
    assert refusal(store) == f"{expected}, got {got}. {command(store)}"


@pytest.mark.parametrize(
    ("changes", "text", "is_final"),
    [
        ({"version": "1.6.0.3"}, "one of version 1.6.0.3", False),
        ({"targets": (89,)}, "one for SM89", False),
        (
            {"targets": (89,), "left_out": {"86": "No."}},
            "it cannot be built for this GPU: No.",
            True,
        ),
        ({"graph": "0" * 64}, "one of another graph", False),
        ({"profiles": ({"x": ((1,), (1,), (1,))},)}, "one that takes 'x' from (1,) up to", False),
    ],
)
def test_what_hinders_one_engine_is_what_choosing_tells(store, changes, text, is_final) -> None:
    hindrance = find_hindrance(store, add(store, make(store, **changes)), HERE)
    assert hindrance.text.startswith(text) and hindrance.is_final is is_final
    whole = add(store, make(store))
    assert find_hindrance(store, whole, HERE) is None
    store.path(whole).unlink()
    assert find_hindrance(store, whole, HERE).text == "a file that has not its 6 bytes"


def test_none_is_there(store) -> None:
    add(store, make(store, form="fp16"))
    add(store, make(store, component="head"))
    expected = "block.bf16: expected an engine of tensorrt-rtx 1.7.1.116 for SM86, got none."
    assert refusal(store) == f"{expected} {command(store)}"


def test_a_profile_that_is_too_small_names_the_tensor_and_both_sizes(store) -> None:
    add(store, make(store, replace(HERE, limits=VideoLimits(64, 64, 97, 5))))
    assert (
        "got one that takes 'x' from (1, 1, 64) up to (1, 80, 64), not (1, 120, 64). Run: "
        in refusal(store)
    )
    add(store, make(store, replace(HERE, limits=VideoLimits(64, 96, 77, 5))))
    sizes = "from (1, 2, 1, 32) up to (1, 2, 480, 32), not (1, 2, 600, 32)"
    assert f"got one that takes 'k_cache' {sizes}. Run: " in refusal(store)


@pytest.mark.parametrize(("part", "named"), [("head", False), ("vae_decoder_next", True)])
def test_the_command_names_what_is_not_built_unasked(store, monkeypatch, part, named) -> None:
    rough = {"head": 0.5, "vae_decoder_next": 0.5}
    monkeypatch.setattr(engines, "find_rough", lambda *_: rough)
    assert (f" --component {part} --engines " in refusal(store, Part(part))) is named


BUCKETS = 1.0, 0.75, 0.5, 0.4, 0.25  # of the bundle: what passes are padded to


def test_a_profile_for_a_whole_pass_is_among_those_of_buckets(store) -> None:
    quarter = add(store, make(store, shares=(0.5, 0.25)))
    assert "got one that takes 'x' from (1, 60, 64) up to (1, 60, 64), not (1, 120, 64)" in refusal(
        store
    )
    add(store, make(store, replace(HERE, limits=VideoLimits(128, 96, 97, 5)), shares=(1.0,)))
    assert "got one that takes 'x' from (1, 240, 64) up to (1, 240, 64)" in refusal(store)
    whole = add(store, make(store, shares=BUCKETS, targets=(86,)))
    assert choose_engine(store, BLOCK, HERE).file == whole.file != quarter.file


@pytest.mark.parametrize(
    ("shares", "nearest", "missing"),
    [((1.0, 0.5), 120, 90), ((1.0, 0.75, 0.5), 60, 48), ((1.0, 0.75, 0.5, 0.4), 48, 30)],
)
def test_every_bucket_of_the_bundle_has_a_profile(store, shares, nearest, missing) -> None:
    add(store, make(store, shares=shares))
    sizes = f"from (1, {nearest}, 64) up to (1, {nearest}, 64), not (1, {missing}, 64)"
    assert refusal(store).endswith(f"got one that takes 'x' {sizes}. {command(store)}")
    assert "--buckets" not in command(store)  # so that it builds those of the bundle
    more = add(store, make(store, shares=(*BUCKETS, 0.1), targets=(86,)))
    assert choose_engine(store, BLOCK, HERE).file == more.file


def test_an_engine_without_its_end_is_refused(store) -> None:
    path = store.path(add(store, make(store)))
    path.write_bytes(PLAN[:-1])
    assert "got a file that has not its 6 bytes. Run: mc-build " in refusal(store)
    path.write_bytes(PLAN[:-1] + b"?")
    found = choose_engine(store, BLOCK, HERE)
    with pytest.raises(EngineError, match=r"for SM86, got other content in .*\.engine\. Run: mc-b"):
        read_plan(store, found, HERE)
    assert store.find(found.file, found.inputs) is None  # so that the command builds it again


def test_a_damaged_sidecar_is_passed_over(store) -> None:
    path = store.path(add(store, make(store)))
    Path(f"{path}.json").write_text("{}")
    assert ", got none. Run: " in refusal(store)


def test_what_cannot_be_built_here_is_for_onnx_runtime(store) -> None:
    add(store, make(store, targets=(89,), left_out={"86": "No product of such matrices."}))
    assert refusal(store).endswith(
        "got none, as it cannot be built: No product of such matrices. Run it with ONNX Runtime."
    )


def test_the_command_asks_for_no_type_that_the_gpu_lacks(store) -> None:
    assert "--sm 75 --dtype fp16 " in refusal(store, place=replace(HERE, capability=75))
    assert "--sm 80 --dtype bf16 " in refusal(store, place=replace(HERE, capability=80))


def test_groups_of_layers_are_engines_of_their_own(store) -> None:
    add(store, make(store))
    group = Part("block", (0, 1))
    assert "block.00-01.bf16: expected an engine of " in refusal(store, group)
    added = add(store, make(store, part=group))
    assert choose_engine(store, group, HERE).file == added.file
    assert choose_engine(store, BLOCK, HERE).layers == ()


def test_tensorrt_builds_for_the_gpu_that_is_there(store) -> None:
    place = replace(HERE, backend="tensorrt", version="10.16.1.11", capability=90)
    message = refusal(store, place=place)
    assert "expected an engine of tensorrt 10.16.1.11 for SM90, got none. Run: " in message
    assert "--backend tensorrt --dtype bf16 --height 64" in message and "--sm" not in message


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"schema": "motioncache.engine/v0"}'])
def test_a_damaged_sidecar_is_named(data: bytes) -> None:
    with pytest.raises(EngineError) as error:
        Sidecar.from_bytes("x.engine.json", data)
    assert str(error.value).startswith("x.engine.json: expected the sidecar of an engine, got ")
    assert str(error.value).endswith(". Run mc-build --clean.")


def test_a_sidecar_survives_its_file() -> None:
    profiles = ({"x": ((1,), (2,), (3,))},)
    sidecar = Sidecar(
        "x",
        (1, 2),
        "bf16",
        "b",
        "1",
        (86,),
        {},
        profiles,
        "a" * 64,
        "0" * 64,
        True,
        5,
        "f" * 64,
        1.5,
    )
    read = Sidecar.from_bytes("x", sidecar.to_bytes())
    assert read.file == "engines/b-1/x.01-02.bf16.0000000000000000.engine"
    assert json.loads(read.to_bytes()) == json.loads(sidecar.to_bytes())
    assert np.array_equal(read.profiles[0]["x"], [[1], [2], [3]])


@pytest.mark.parametrize(
    ("before", "changes", "name"),
    [
        ((), {}, "combine"),
        (("--sm", "89"), {}, "combine"),
        (("--height", "64", "--width", "64"), {}, "combine"),
        ((), {"capability": 75, "form": "fp16"}, "combine"),
        ((), {"form": "fp32"}, "block"),
    ],
)
def test_the_command_makes_an_engine_that_fits(
    before, changes, name, tiny_bundle, tmp_path, monkeypatch
) -> None:
    """With a small component in place of all, and the real library."""
    library = pytest.importorskip("tensorrt_rtx", reason="extra rtx is not installed")
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny.bundle"))
    place, part = replace(HERE, version=library.__version__, **changes), Part(name)
    monkeypatch.setattr(build_cli, "_choose_components", lambda *_: [name])

    def run(*words: str) -> None:
        result = CliRunner().invoke(build_cli.main, words)
        assert result.exit_code == 0, result.output

    if before:
        run(str(bundle), *before)
    store = EngineStore(Bundle.open(bundle))
    found = re.fullmatch(
        rf"{name}\.{place.form}: expected .* Run: mc-build (.*)", refusal(store, part, place)
    )
    assert found
    run(*shlex.split(found[1]))
    sidecar = choose_engine(store, part, place)
    assert (
        sidecar.targets == (place.capability,)
        and len(read_plan(store, sidecar, place)) == sidecar.size
    )
