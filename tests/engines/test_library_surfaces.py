"""A whole build on every version of TensorRT, each a stand-in that has its names and no other.

A call to a name that a supported version does not have fails here. What the stand-ins build is
nothing; the real TensorRT-RTX builds in the other tests.
"""

import shutil
import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnx
import pytest
from click.testing import CliRunner
from strict_library import StrictLibrary, make_library, read_surfaces

from mc_engines import build_cli
from mc_engines.build_cli import main
from mc_engines.building.bounds import VideoLimits, bound_symbols
from mc_engines.building.compile import Request, build_plan
from mc_engines.building.library import Library
from mc_engines.building.store import EngineStore
from mc_engines.bundle import Bundle
from mc_engines.errors import BuildError

SURFACES = read_surfaces(Path(__file__).parent / "data" / "surfaces.json")
BY_VERSION = {f"{each.library} {each.version}": each for each in SURFACES}
RTX = SURFACES[-1]
GPU = 90  # compute capability of the one that is here


class Builder:
    """Counts on what the parser and the profiles gave it."""

    def __init__(self, log):
        assert isinstance(log, self._library.ILogger)

    def create_network(self, flags):
        return self._library.INetworkDefinition()

    def create_builder_config(self):
        return self._library.IBuilderConfig()

    def create_optimization_profile(self):
        return self._library.IOptimizationProfile()

    def build_serialized_network(self, network, config):
        names = {tensor.name for tensor in network._inputs}
        assert config._profiles and all(names == set(each._shapes) for each in config._profiles)
        assert names and network._outputs
        monitor = getattr(config, "_monitor", None)
        if monitor is not None:
            monitor.phase_start("Building", None, 2)
            assert all(monitor.step_complete("Building", step) for step in range(2))
            monitor.phase_finish("Building")
        return b"plan of " + ",".join(sorted(names)).encode()


class BuilderConfig:
    def __init__(self):
        self._profiles = []

    @property
    def progress_monitor(self):
        return self._monitor

    @progress_monitor.setter
    def progress_monitor(self, monitor):
        assert isinstance(monitor, self._library.IProgressMonitor)
        self._monitor = monitor

    num_compute_capabilities = 0

    def set_compute_capability(self, capability, place):
        assert 0 <= place < self.num_compute_capabilities
        return True

    def set_flag(self, flag):
        assert isinstance(flag, self._library.BuilderFlag)

    def set_memory_pool_limit(self, pool, size):
        assert isinstance(pool, self._library.MemoryPoolType)

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, data):
        cache = self._library.ITimingCache()
        cache._data = data
        return None if data == b"damaged" else cache

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache
        return not cache._data.startswith(b"other GPU")

    def get_timing_cache(self):
        self._cache._data += b"."
        return self._cache


class TimingCache:
    def serialize(self):
        return memoryview(self._data)


class OptimizationProfile:
    def __init__(self):
        self._shapes = {}

    def set_shape(self, name, least, usual, most):
        self._shapes[name] = least, usual, most


class OnnxParser:
    num_errors = 0

    def __init__(self, network, log):
        self._network = network

    def parse_from_file(self, path):
        graph = onnx.load(path, load_external_data=False).graph
        for values, tensors in (
            (graph.input, self._network._inputs),
            (graph.output, self._network._outputs),
        ):
            tensors += [make_tensor(self._library, value) for value in values]
        return True


def make_tensor(library, value):
    """A network's tensor of an ONNX value; symbols are -1."""
    kinds = {
        onnx.TensorProto.FLOAT: library.DataType.FLOAT,
        onnx.TensorProto.FLOAT16: library.DataType.HALF,
        onnx.TensorProto.BFLOAT16: library.DataType.BF16,
        onnx.TensorProto.INT32: library.DataType.INT32,
        onnx.TensorProto.INT64: library.DataType.INT64,
    }
    tensor, kind = library.ITensor(), value.type.tensor_type
    tensor.name, tensor.dtype = value.name, kinds[kind.elem_type]
    tensor._symbols = [size.dim_param for size in kind.shape.dim]
    tensor.shape = tuple(size.dim_value or -1 for size in kind.shape.dim)
    return tensor


class Tensor:
    name = dtype = shape = None

    def get_dimension_name(self, axis):
        return self._symbols[axis]


class Network:
    """Outputs have no symbols, as those of the real parser."""

    def __init__(self):
        self._inputs, self._outputs = [], []

    num_layers = 1

    def get_layer(self, place):
        return self._library.ILayer()

    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))

    def get_input(self, place):
        return self._inputs[place]

    def get_output(self, place):
        self._outputs[place]._symbols = [""] * len(self._outputs[place].shape)
        return self._outputs[place]

    def add_input(self, name, dtype, shape):
        tensor = self._library.ITensor()
        tensor.name, tensor.dtype, tensor.shape = name, dtype, shape
        self._inputs.append(tensor)
        return tensor

    def add_attention(self, query, key, value, normalization, causal):
        assert isinstance(normalization, self._library.AttentionNormalizationOp)
        return self._library.IAttention()

    def mark_output(self, tensor):
        self._outputs.append(tensor)


class Layer:
    """A product of 16 bits."""

    name = "a product"
    type = property(lambda self: self._library.LayerType.MATRIX_MULTIPLY)

    def get_input(self, place):
        tensor = self._library.ITensor()
        tensor.dtype = self._library.DataType.HALF
        return tensor


class ParserError:
    def node_operator(self):
        return "NoSuchThing"

    def desc(self):
        return "no importer registered"


class Attention:
    decomposable = mask = None

    def get_output(self, place):
        return self._library.ITensor()


BUILDING = {
    "Builder": Builder,
    "IAttention": Attention,
    "IBuilderConfig": BuilderConfig,
    "ILayer": Layer,
    "INetworkDefinition": Network,
    "IOptimizationProfile": OptimizationProfile,
    "ITensor": Tensor,
    "ITimingCache": TimingCache,
    "OnnxParser": OnnxParser,
    "ParserError": ParserError,
}


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny.bundle"))


def build(monkeypatch, surface, bundle: Path, *options: object) -> StrictLibrary:
    return run(monkeypatch, surface, bundle, *options)[0]


def run(monkeypatch, surface, bundle: Path, *options: object) -> tuple[StrictLibrary, str]:
    library = make_library(surface, BUILDING)
    monkeypatch.setitem(sys.modules, surface.library, library.module)
    monkeypatch.setattr(build_cli, "open_gpu", lambda: SimpleNamespace(capability=GPU))
    backend = surface.library.replace("_", "-")
    arguments = [bundle, "--backend", backend, *options]
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    if result.exception is not None:
        raise result.exception
    return library, result.stdout


@pytest.mark.parametrize("version", BY_VERSION)
def test_every_version_builds_every_graph_with_calls_that_it_has(
    version: str, bundle: Path, monkeypatch
) -> None:
    surface = BY_VERSION[version]
    library = build(monkeypatch, surface, bundle, "--workspace", 64)
    sidecars = EngineStore(Bundle.open(bundle)).read()[0]
    assert {each.version for each in sidecars} == {surface.version}
    assert len(sidecars) == len(Bundle.open(bundle).manifest.components) - 1 == 13
    rtx, checks = surface is RTX, "add_attention" in surface.names["INetworkDefinition"]
    targets = (80, 86, 89, 120) if rtx else (GPU,)
    assert {each.targets for each in sidecars} == {targets}
    limits = [call[2] for call in library.calls if call[0].endswith(".set_memory_pool_limit")]
    assert limits == 13 * [64_000_000]
    # one profile for RTX; else 5 buckets, which only block and combine can tell apart
    profiles = 13 if rtx else 11 + 5 + 5
    assert library.count("IBuilderConfig.add_optimization_profile") == profiles + 2 * checks
    assert library.count("INetworkDefinition.add_attention") == 2 * checks
    flags = {call[1] for call in library.calls if call[0] == "Builder.create_network"}
    assert flags == {1 << library.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED}


def test_attention_that_a_version_cannot_be_asked_about_is_said_not_to_be_checked(
    bundle, monkeypatch
) -> None:
    for surface, checks in zip(SURFACES[:2], (False, True), strict=True):
        shown = run(monkeypatch, surface, bundle)[1]
        lines = [line for line in shown.splitlines() if "attention" in line]
        said = (
            f"attention not checked: tensorrt {surface.version} cannot be asked whether it is one"
        )
        assert [line.split()[0] for line in lines if said in line] == (
            [] if checks else ["block", "text_layer"]
        )
        assert sum("attention is one kernel" in line for line in lines) == 2 * checks


@pytest.mark.parametrize("version", [each for each in BY_VERSION if "rtx" not in each])
def test_measured_times_are_kept_and_used_again(version, bundle, tmp_path, monkeypatch) -> None:
    arguments = (
        "--component",
        "embed",
        "--component",
        "text_norm",
        "--timing-cache",
        tmp_path / "times",
    )
    build(monkeypatch, BY_VERSION[version], bundle, *arguments)
    assert (tmp_path / "times").read_bytes() == b".."
    library = build(monkeypatch, BY_VERSION[version], bundle, *arguments, "--height", 256)
    assert (tmp_path / "times").read_bytes() == b"..."  # text has the same size in any video
    assert ("IBuilderConfig.create_timing_cache", b"..") in library.calls
    assert sorted(path.name for path in tmp_path.iterdir()) == ["times", "tiny.bundle"]


def test_a_gpu_without_bf16_is_known_before_anything_is_built(bundle, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "GPU", 75)
    with pytest.raises(SystemExit):
        build(monkeypatch, SURFACES[0], bundle)
    build(monkeypatch, SURFACES[0], bundle, "--dtype", "fp16", "--component", "embed")


@pytest.mark.parametrize("shares", ["1,.5", ".25,1,.5", "1"])
def test_profiles_are_those_of_the_buckets_that_were_asked_for(shares, bundle, monkeypatch) -> None:
    build(monkeypatch, SURFACES[0], bundle, "--component", "combine", "--buckets", shares)
    (sidecar,) = EngineStore(Bundle.open(bundle)).read()[0]
    tokens = [profile["y"][2][1] for profile in sidecar.profiles]
    assert tokens == sorted((10200 * float(share) for share in shares.split(",")), reverse=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *(
            (
                ("--buckets", shares),
                f"buckets: expected shares above 0 up to 1, got '{shares}'. Write it like 1,.5,.25",
            )
            for shares in ("0,1", "1.5", "x", "1,", "")
        ),
        (
            ("--sm", "89"),
            "sm: expected none, for tensorrt builds for the GPU that is here, got 89. Leave it out",
        ),
    ],
)
def test_wrong_usage_of_tensorrt_says_what_to_do(arguments, said, bundle, monkeypatch) -> None:
    library = make_library(SURFACES[0], BUILDING)
    monkeypatch.setitem(sys.modules, "tensorrt", library.module)
    monkeypatch.setattr(build_cli, "open_gpu", lambda: SimpleNamespace(capability=GPU))
    result = CliRunner().invoke(main, [str(bundle), "--backend", "tensorrt", *arguments])
    assert (result.exit_code, result.stderr) == (2, f"{said}.\n")


def test_an_engine_of_tensorrt_is_for_the_gpu_that_built_it(bundle, monkeypatch) -> None:
    arguments = "--component", "embed"
    build(monkeypatch, SURFACES[0], bundle, *arguments)
    build(monkeypatch, SURFACES[0], bundle, *arguments)
    with monkeypatch.context() as other:
        other.setitem(globals(), "GPU", 120)
        build(monkeypatch, SURFACES[0], bundle, *arguments)
    assert [each.targets for each in EngineStore(Bundle.open(bundle)).read()[0]] in (
        [(90,), (120,)],
        [(120,), (90,)],
    )


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (Builder, "build_serialized_network", "Leave out the target or the dtype that it names."),
        (OnnxParser, "parse_from_file", "Use another version, or run it with ONNX Runtime."),
    ],
)
def test_a_library_that_fails_without_a_word_has_no_reason(bundle, owner, name, said) -> None:
    silent = type(owner.__name__, (), {**vars(owner), name: lambda *_: None})
    module = make_library(SURFACES[0], {**BUILDING, owner.__name__: silent}).module
    opened = Bundle.open(bundle)
    symbols = bound_symbols(opened.manifest.config, VideoLimits(64, 64, 97, 5))
    graph, path = opened.graph("embed", "bf16"), opened.graph_path("embed", "bf16")
    with pytest.raises(BuildError) as error:
        build_plan(Library("tensorrt", module), graph, path, Request((GPU,), [symbols]))
    assert str(error.value).endswith(f", got: no reason. {said}")


@pytest.mark.parametrize("version", BY_VERSION)
def test_every_version_says_what_it_cannot_parse(version, bundle) -> None:
    class Failing(OnnxParser):
        num_errors = 2

        def parse_from_file(self, path):
            return False

        def get_error(self, place):
            assert place in (0, 1)
            return self._library.ParserError()

    surface = BY_VERSION[version]
    behaviour = type("OnnxParser", (), {**vars(OnnxParser), **vars(Failing)})
    module = make_library(surface, {**BUILDING, "OnnxParser": behaviour}).module
    opened = Bundle.open(bundle)
    symbols = bound_symbols(opened.manifest.config, VideoLimits(64, 64, 97, 5))
    graph, path = opened.graph("embed", "bf16"), opened.graph_path("embed", "bf16")
    library = Library("tensorrt", module)
    with pytest.raises(BuildError) as error:
        build_plan(library, graph, path, Request((GPU,), [symbols]))
    reason = "NoSuchThing: no importer registered"
    assert f"can parse, got: {reason}; {reason}. Use another version" in str(error.value)


@pytest.mark.parametrize("content", [b"damaged", b"other GPU"])
def test_times_of_another_gpu_are_refused(content, bundle, tmp_path, monkeypatch) -> None:
    (tmp_path / "times").write_bytes(content)
    with pytest.raises(SystemExit):
        build(monkeypatch, SURFACES[0], bundle, "--timing-cache", tmp_path / "times")
    assert (tmp_path / "times").read_bytes() == content


def test_the_record_of_rtx_is_what_the_installed_binding_has() -> None:
    binding = pytest.importorskip("tensorrt_rtx_bindings", reason="extra rtx is not installed")
    if binding.__version__ != RTX.version:
        pytest.skip(f"The record is of {RTX.version}.")
    for path, names in RTX.names.items():
        owner = binding if path == "module" else attrgetter(path)(binding)
        found = {name for name in dir(owner) if not name.startswith("_")}
        found -= {name for name in found if isinstance(getattr(owner, name), ModuleType)}
        assert found == set(names), path
    for path, members in RTX.enums.items():
        assert list(attrgetter(path)(binding).__members__) == members


# Names that came or went: what each version must have, and what it must not.
CHANGES = [
    (
        "10.13.3.9",
        "IBuilderConfig.set_timing_cache BuilderFlag.FP16",
        "INetworkDefinition.add_attention",
    ),
    ("10.14.1.48.post1", "INetworkDefinition.add_attention", "INetworkDefinition.add_moe"),
    ("11.0.0.114", "ICudaEngine.device_memory_size_v2", "BuilderFlag.FP16"),
    ("11.4.0.106", "IExecutionContext.execute_async_v3", "IBuilderConfig.set_compute_capability"),
    ("1.7.1.116", "IBuilderConfig.set_compute_capability", "BuilderFlag.FP16"),
]


@pytest.mark.parametrize(("version", "there", "gone"), CHANGES)
def test_a_stand_in_has_the_names_of_its_version_alone(version, there, gone) -> None:
    (surface,) = (each for each in SURFACES if each.version == version)
    module = make_library(surface, BUILDING).module
    for name in there.split():
        assert attrgetter(name)(module) is not None
    with pytest.raises(AttributeError):
        attrgetter(gone)(module)


def test_behaviour_cannot_add_names_and_attributes_cannot_either() -> None:
    module = make_library(BY_VERSION["tensorrt 10.13.3.9"], BUILDING).module
    config = module.IBuilderConfig()
    with pytest.raises(AttributeError):
        config.set_compute_capability(1, 0)  # the behaviour has it, this version has not
    with pytest.raises(AttributeError):
        config.num_compute_capabilities = 1
    with pytest.raises(
        NotImplementedError, match=r"^IBuilderConfig\.clear_flag: the stand-in has no"
    ):
        config.clear_flag(0)


def test_a_call_that_one_version_lacks_fails_its_build(bundle: Path, monkeypatch) -> None:
    monkeypatch.setattr(Library, "can_check_attention", True)
    with pytest.raises(AttributeError, match="add_attention"):
        build(monkeypatch, SURFACES[0], bundle)
    build(monkeypatch, SURFACES[1], bundle)
