"""Where tensors come from: shards, pickles, random values; and files that are damaged."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mc_engines.errors import CheckpointError
from mc_export.random_source import RandomSource
from mc_export.tensor_source import PickleSource, RenamedSource, SafetensorsSource

A, B = torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)


def shards(folder: Path, count: int = 2, index: dict[str, str] | None = None) -> Path:
    for number, tensors in ((1, {"a": A}), (2, {"b": B})):
        save_file(tensors, folder / f"model-{number:05d}-of-{count:05d}.safetensors")
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_shards_without_an_index_are_one_source(tmp_path: Path) -> None:
    source = SafetensorsSource(shards(tmp_path))
    assert source.names() == {"a", "b"}
    assert (source.shape("a"), source.shape("b")) == ((2, 3), (4,))
    assert (source.dtype("a"), source.dtype("b")) == (torch.float32, torch.bfloat16)
    assert torch.equal(source.load("a"), A) and torch.equal(source.load("b"), B)


def test_an_index_names_the_files_that_count(tmp_path: Path) -> None:
    index = {
        name: f"model-0000{number}-of-00002.safetensors" for name, number in (("a", 1), ("b", 2))
    }
    shards(tmp_path, index=index)
    save_file({"a": A + 1}, tmp_path / "model.fp16.safetensors")
    assert torch.equal(SafetensorsSource(tmp_path).load("a"), A)


def test_a_tensor_of_the_index_that_is_not_there_is_named(tmp_path: Path) -> None:
    first = "model-00001-of-00002.safetensors"
    shards(tmp_path, index={"a": first, "c": first, "b": first.replace("1", "2", 1)})
    with pytest.raises(CheckpointError, match=f"{first}: expected the tensor 'c' that the index"):
        SafetensorsSource(tmp_path)


def test_a_file_of_the_index_that_is_not_there_is_named(tmp_path: Path) -> None:
    shards(tmp_path, index={"a": "gone.safetensors"})
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: expected a whole safetensors"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": [1]}', '{"other": {}}'])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (shards(tmp_path) / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json: expected JSON with a weight_map"):
        SafetensorsSource(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    message = r"model-00003-of-00003\.safetensors: expected 3 shards, got no such file"
    with pytest.raises(CheckpointError, match=message):
        SafetensorsSource(shards(tmp_path, count=3))


def test_two_variants_in_one_folder_are_refused(tmp_path: Path) -> None:
    for name in ("model", "model.fp16"):
        save_file({"a": A}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"got 'a' twice\. Keep one variant of the weights"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_truncated_safetensors_file_is_named(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": A}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a whole safetensors"):
        SafetensorsSource(tmp_path)


def test_a_pickle_is_a_source(tmp_path: Path) -> None:
    torch.save({"a": A, "b": B}, tmp_path / "x.pth")
    source = PickleSource(tmp_path / "x.pth")
    assert source.names() == {"a", "b"} and source.shape("a") == (2, 3)
    assert source.dtype("b") == torch.bfloat16 and torch.equal(source.load("a"), A)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_pickle_is_named(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "x.pth"
    torch.save({"a": A}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"x\.pth: expected a whole file in torch's zip"):
        PickleSource(file)


def test_a_pickle_that_cannot_be_mapped_is_refused(tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"x\.pth: expected a whole file in torch's zip"):
        PickleSource(tmp_path / "x.pth")


class Attack:
    """Would write a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.file),)


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    torch.save({"a": A, "b": Attack(tmp_path / "harm")}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="expected nothing but tensors, got other objects"):
        PickleSource(tmp_path / "x.pth")
    assert not (tmp_path / "harm").exists()
    pickle.loads(pickle.dumps(Attack(tmp_path / "harm")))
    assert (tmp_path / "harm").exists(), "the attack works where code is run"


@pytest.mark.parametrize("content", [[A], {"state_dict": {"a": A}}, {"a": 1}])
def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors, got something"):
        PickleSource(tmp_path / "x.pth")


def test_a_renamed_source_is_the_same_under_new_names() -> None:
    source = RandomSource({"a": (2, 3), "b": (4,)}, torch.float16, seed=0)
    renamed = RenamedSource(source, {"a": "x", "b": "b"}.__getitem__)
    assert renamed.names() == {"x", "b"}
    assert (renamed.shape("x"), renamed.dtype("x")) == ((2, 3), torch.float16)
    assert torch.equal(renamed.load("x"), source.load("a"))


def test_two_tensors_of_one_new_name_are_refused() -> None:
    source = RandomSource({"a": (1,), "b": (1,), "c": (1,)}, torch.float32, seed=0)
    with pytest.raises(CheckpointError, match=r"'x': expected one tensor of that name, got \['a'"):
        RenamedSource(source, {"a": "x", "b": "x", "c": "c"}.__getitem__)


def test_random_tensors_come_from_name_and_seed_alone() -> None:
    shapes = {"a.weight": (3, 4), "b.weight": (3, 4)}
    source = RandomSource(shapes, torch.float32, seed=1)
    later = RandomSource(dict(reversed(shapes.items())) | {"c": (9,)}, torch.float32, seed=1)
    assert torch.equal(source.load("a.weight"), later.load("a.weight"))
    assert not torch.equal(source.load("a.weight"), source.load("b.weight"))
    other = RandomSource(shapes, torch.float32, seed=2)
    assert not torch.equal(source.load("a.weight"), other.load("a.weight"))


@pytest.mark.parametrize(
    ("name", "shape", "mean", "deviation"),
    [
        ("ffn.weight", (3000, 2000), 0.0, 2000**-0.5),  # drawn in two pieces
        ("conv.weight", (100, 20, 3, 3, 3), 0.0, 540**-0.5),
        ("norm.weight", (5000,), 1.0, 0.1),
        ("norm.gamma", (5000, 1, 1, 1), 1.0, 0.1),
        ("to_q.bias", (5000,), 0.0, 0.02),
    ],
)
def test_random_tensors_keep_the_size_of_activations(
    name: str, shape: tuple[int, ...], mean: float, deviation: float
) -> None:
    tensor = RandomSource({name: shape}, torch.float32, seed=0).load(name)
    assert tensor.shape == shape
    for half in tensor.flatten().chunk(2):
        assert half.mean() == pytest.approx(mean, abs=5 * deviation / half.numel() ** 0.5)
        assert half.std() == pytest.approx(deviation, rel=0.05)


def test_loading_from_files_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    big = torch.ones(64 << 20, dtype=torch.bfloat16)  # 128 MB
    save_file({"a": big}, tmp_path / "big.safetensors")
    torch.save({"a": big}, tmp_path / "big.pth")
    script = f"""
        from pathlib import Path
        from mc_export.checkpoint import load_finite
        from mc_export.tensor_source import PickleSource, SafetensorsSource

        def private():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

        folder = Path({str(tmp_path)!r})
        for source in (SafetensorsSource(folder), PickleSource(folder / "big.pth")):
            before = private()
            tensor = load_finite(source, "a")
            print(private() - before)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert all(int(kilobytes) < 20_000 for kilobytes in done.stdout.split()), done.stdout
    assert len(done.stdout.split()) == 2
