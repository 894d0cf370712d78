"""What TensorRT-RTX compiles on the user's GPU lives as long as contexts are opened with it."""

import gc
import weakref
from enum import IntEnum
from types import SimpleNamespace

import pytest

from mc_engines.building.library import Library


class Cache:
    data = b"compiled"

    def deserialize(self, data):
        self.data = data

    def serialize(self):
        return None if self.data == b"broken" else memoryview(self.data)


class Config:
    """As in the binding of 1.7.1: what is set is not kept alive."""

    def set_execution_context_allocation_strategy(self, strategy):
        pass

    def create_runtime_cache(self):
        return Cache()

    def set_runtime_cache(self, cache):
        self.cache = weakref.ref(cache)


class Engine:
    def create_runtime_config(self):
        return Config()

    def create_execution_context(self, config):
        assert config.cache() is not None, "the cache is gone"
        return "context"


@pytest.fixture
def library() -> Library:
    module = SimpleNamespace(
        DynamicShapesKernelSpecializationStrategy=IntEnum("Strategy", ["EAGER"]),
        ExecutionContextAllocationStrategy=IntEnum("Allocation", ["USER_MANAGED"]),
    )
    return Library("tensorrt-rtx", module)


def test_the_cache_lives_as_long_as_its_config(library) -> None:
    engine = Engine()
    config = library.create_runtime_config(engine, b"from before")
    gc.collect()
    assert library.open_context(engine, config) == "context"
    assert library.read_runtime_cache(config) == b"from before"


def test_a_cache_that_cannot_be_written_is_none(library) -> None:
    config = library.create_runtime_config(Engine(), b"broken")
    assert library.read_runtime_cache(config) is None
