"""The mapped tensors equal what the safetensors library reads; no damage gets through quietly."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mc_engines.errors import BundleError
from mc_engines.safetensors_map import map_safetensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@shared_folder
@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    )
)
def test_equals_the_safetensors_library(tmp_path, layout):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, (dtype, shape) in layout.items()
    }
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    mapped = map_safetensors(tmp_path / "a.safetensors")
    assert mapped.keys() == tensors.keys()
    for name, expected in load_file(tmp_path / "a.safetensors").items():
        assert mapped[name].shape == tuple(expected.shape)
        assert str(expected.dtype) == f"torch.{mapped[name].dtype}"
        np.testing.assert_array_equal(mapped[name].astype(np.float64), expected.double().numpy())


def test_bfloat16_keeps_every_bit(tmp_path):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    save_file({"x": bits.view(torch.bfloat16)}, tmp_path / "a.safetensors")
    mapped = map_safetensors(tmp_path / "a.safetensors")["x"]
    assert mapped.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(mapped.view(np.int16), bits.numpy())


def test_arrays_are_read_only_views_of_the_file(tmp_path):
    save_file({"x": torch.ones(3), "none": torch.ones(0)}, tmp_path / "a.safetensors")
    mapped = map_safetensors(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="read-only"):
        mapped["x"][0] = 2
    assert not mapped["none"].flags.writeable
    with (tmp_path / "a.safetensors").open("r+b") as file:  # a copy would not see this
        file.seek(-4, 2)
        file.write(np.float32(5).tobytes())
    assert mapped["x"][2] == 5


@pytest.mark.parametrize("size", range(0, 100, 7))
def test_truncation_is_refused(tmp_path, size):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(3, 4)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BundleError, match=r"truncated or damaged: copy or export it again"):
        map_safetensors(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": entry(0, 8, [3])}, r"expected 'x' at bytes \[0, 12\], got \[0, 8\]"),
        ({"x": entry(4, 8, [1])}, r"expected 'x' at bytes \[0, 4\], got \[4, 8\]"),
        ({"x": entry(0, 4, [1]), "y": entry(0, 8, [2])}, "expected 'y' at bytes"),
        ({"x": entry(0, 4, [1])}, "expected 4 bytes of tensors, got 8"),
        ({"x": entry(0, 80, [20])}, "expected 80 bytes of tensors, got 8"),
        ({"x": entry(0, 8, [-1, -2])}, "expected whole numbers for 'x'"),
        ({"x": entry(0, 8, [2.0])}, "expected whole numbers for 'x'"),
        ({"x": entry(0, 8, [2], "F31")}, "KeyError"),
        ({"x": {**entry(0, 8, [2]), "data_offsets": [0, 4, 8]}}, "ValueError"),
        ({"x": [0, 8]}, "TypeError"),
        ([], "expected a header of names"),
        (b"{", "JSONDecodeError"),
        (b"\xff", "UnicodeDecodeError"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, message):
    with pytest.raises(BundleError, match=message):
        map_safetensors(write(tmp_path / "a.safetensors", header, bytes(8)))


@shared_folder
@given(st.data())
def test_a_changed_header_is_refused_or_still_describes_the_file(tmp_path, data):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(3, 4), "y": torch.ones(2, dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 53))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        mapped = map_safetensors(path)
    except BundleError:
        return
    assert sum(array.nbytes for array in mapped.values()) == 52
