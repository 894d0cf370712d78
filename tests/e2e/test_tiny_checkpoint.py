"""The checkpoint that the other tests and the demo stand on."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import PARTS, make_tiny_checkpoint


def read_files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_seed_gives_the_same_files(tmp_path):
    first, second, other = (
        read_files(make_tiny_checkpoint(tmp_path / str(number), seed))
        for number, seed in enumerate((0, 0, 1))
    )
    assert first == second
    assert {path.parts[0] for path in first} == {*PARTS, "model_index.json"}
    changed = {path.parts[0] for path in first if first[path] != other[path]}
    assert changed == {"transformer", "text_encoder", "vae"}


@pytest.mark.parametrize("shards", [1, 3])
def test_only_the_parts_asked_for_are_written(tmp_path, shards):
    make_tiny_checkpoint(tmp_path, parts=("transformer",), shards=shards, dtype=torch.bfloat16)
    assert {path.parent.name for path in read_files(tmp_path)} == {"", "transformer"}
    files = list((tmp_path / "transformer").glob("*.safetensors"))
    assert len(files) >= shards and (len(files) == 1) == (shards == 1)
    dtypes = {tensor.dtype for file in files for tensor in load_file(file).values()}
    assert dtypes == {torch.bfloat16}
