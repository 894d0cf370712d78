"""Stand-ins for the runtimes of `tensorrt` and `tensorrt_rtx` that compute with ONNX Runtime.

An engine's bytes are a JSON that names the ONNX file, the GPU it is for, and its profiles. Work is
put on the streams of `StandInDriver`, with the addresses and shapes of the moment it was enqueued;
it fails where a GPU would compute something else without saying so.
"""

import json
import weakref
from functools import cache
from types import SimpleNamespace

import numpy as np
import onnxruntime
from stand_in_driver import Fault

VERSION = "1.7.1.116"
SCRATCH = 4096
_DTYPES = {"tensor(float)": "float32", "tensor(int32)": "int32", "tensor(int64)": "int64"}


@cache
def open_session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # errors are faults, and are raised
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def make_plan(path, profiles, capability=86, version=VERSION):
    """Bytes of an engine; profiles hold (least, usual, most) by input."""
    value = {"onnx": str(path), "profiles": profiles, "sm": capability, "version": version}
    return json.dumps(value).encode()


class StandInTensorRT:
    """The module `tensorrt`: what `Library` and `DeviceEngine` use of it."""

    __version__ = VERSION

    class ILogger:
        Severity = SimpleNamespace(ERROR=1)

        def __init__(self):
            pass

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
    INetworkDefinition = SimpleNamespace(add_attention=None)

    def __init__(self, driver):
        self.driver = driver

    def Runtime(self, log):
        return StandInRuntime(self.driver, log, StandInEngine)


class StandInLibrary(StandInTensorRT):
    """The module `tensorrt_rtx`, which has more."""

    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER=1)
    ComputeCapability = SimpleNamespace(__members__={"NONE": 0, "SM86": 86})

    def Runtime(self, log):
        return StandInRuntime(self.driver, log, StandInRtxEngine)


class StandInRuntime:
    def __init__(self, driver, log, engine):
        self.driver, self.log, self.engine = driver, log, engine

    def deserialize_cuda_engine(self, plan):
        major, minor = self.driver.capability
        try:
            value = json.loads(plan)
        except ValueError:
            self.log.log(1, "the plan is not one")
            return None
        if value["version"] != VERSION or value["sm"] != 10 * major + minor:
            self.log.log(1, f"the plan is of {value['version']} for SM{value['sm']}")
            return None
        return self.engine(self.driver, self.log, value)


class StandInEngine:
    device_memory_size_v2 = SCRATCH

    def __init__(self, driver, log, value):
        self.driver, self.log, self.profiles = driver, log, value["profiles"]
        self.session = open_session(value["onnx"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(self.profiles)

    def get_tensor_name(self, number):
        return self.names[number]

    def get_tensor_profile_shape(self, name, number):
        return self.profiles[number][name]

    def create_execution_context(self, strategy):
        assert strategy == 2
        return StandInContext(self)


class StandInRtxEngine(StandInEngine):
    def create_runtime_config(self):
        return StandInConfig()

    def create_execution_context(self, config):
        assert (config.strategy, config.dynamic_shapes_kernel_specialization_strategy) == (2, 1)
        return StandInRtxContext(self)


class StandInConfig:
    strategy, dynamic_shapes_kernel_specialization_strategy = None, None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return StandInCache()

    def set_runtime_cache(self, cache):
        self.cache = cache

    def get_runtime_cache(self):
        return self.cache


class StandInCache:
    compiled = b"compiled"

    def deserialize(self, data):
        self.compiled = data
        return True

    def serialize(self):
        return self.compiled


class StandInContext:
    def __init__(self, engine):
        self.engine, self.driver = engine, engine.driver
        self.shapes, self.addresses, self.scratch, self.profile = {}, {}, None, None
        self.warm = set()  # shapes that were enqueued, and so can be captured
        self.ran = None  # shapes of the last run, which recorded work relies on

    def set_optimization_profile_async(self, number, stream):
        self.profile = self.engine.profiles[number]
        return True

    def set_device_memory(self, address, size):
        assert size >= SCRATCH
        self.scratch = address, size

    def set_input_shape(self, name, shape):
        if any(stream.captured is not None for stream in self.driver.streams):
            self.engine.log.log(1, "a shape was set while work is recorded")
            return False
        least, _, most = self.profile[name]
        fits = len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        )
        if fits:
            self.shapes[name] = tuple(shape)
        return fits

    def set_tensor_address(self, name, address):
        assert address % 16 == 0
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name):
        sizes = {}
        for node in self.engine.inputs.values():
            for symbol, size in zip(node.shape, self.shapes[node.name], strict=True):
                if isinstance(symbol, str):
                    factor, _, letter = symbol.rpartition("*")
                    sizes[letter] = size // int(factor or 1)
        return tuple(resolve(size, sizes) for size in self.engine.outputs[name].shape)

    def execute_async_v3(self, handle):
        missing = set(self.engine.names) - set(self.addresses)
        (stream,) = (each for each in self.driver.streams if int(each) == handle)
        key = tuple(sorted(self.shapes.items()))
        if missing or set(self.shapes) != set(self.engine.inputs):
            self.engine.log.log(1, f"no address or shape of {sorted(missing)}")
            return False
        if stream.captured is not None and key not in self.warm:
            self.engine.log.log(1, "captured before it ran in these shapes")
            return False
        self.warm.add(key)
        alive, shapes, addresses = weakref.ref(self), dict(self.shapes), dict(self.addresses)
        recorded, scratch = stream.captured is not None, self.scratch

        def work():
            context = alive()
            if context is None or (recorded and context.ran != key):
                raise Fault("a context that is gone, or has run in other shapes since")
            context.ran = key
            compute(context, shapes, addresses, scratch)

        self.driver.put(stream, work)
        return True


class StandInRtxContext(StandInContext):
    def is_stream_capturable(self, stream):
        return True


def resolve(size, sizes):
    """The number behind `h`, or `8*h`."""
    if isinstance(size, int):
        return size
    factor, _, letter = size.rpartition("*")
    return int(factor or 1) * sizes[letter]


def compute(context, shapes, addresses, scratch):
    """Run the ONNX graph on what lies at the addresses now."""
    engine, view = context.engine, context.driver.view
    view(*scratch)[:] = 0xEE
    feeds = {}
    for name, node in engine.inputs.items():
        dtype = np.dtype(_DTYPES[node.type])
        size = int(np.prod(shapes[name])) * dtype.itemsize
        feeds[name] = view(addresses[name], size).view(dtype).reshape(shapes[name])
    try:
        results = engine.session.run(list(engine.outputs), feeds)
    except Exception as error:  # what a GPU would compute from such inputs is anyone's guess
        raise Fault(f"cannot be computed: {error}") from error
    for name, result in zip(engine.outputs, results, strict=True):
        flat = np.ascontiguousarray(result).view(np.uint8).ravel()
        view(addresses[name], len(flat))[:] = flat
