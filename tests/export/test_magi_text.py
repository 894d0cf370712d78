"""T5 beside a MAGI-1 transformer: how it is opened, and what its tokenizer becomes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from magi_parts import CORPUS, EXTRA_IDS, write_sentencepiece, write_shards, write_t5
from safetensors.torch import load_file
from transformers import T5Tokenizer

from mc_engines.errors import CheckpointError
from mc_export.checkpoint import check_tensors
from mc_export.export_bundle import count_steps, expected_tensors
from mc_export.magi_checkpoint import load_magi_checkpoint
from mc_export.magi_family import MAGI_FAMILY
from mc_export.t5_tokenizer import write_t5_tokenizer
from mc_runtime.text import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(GOLDEN / "magi-a", tmp_path / "checkpoint")


# ---- tokenizer


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return write_sentencepiece(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="module")
def converted(pieces):
    write_t5_tokenizer(pieces, pieces / "tokenizer")
    return Tokenizer.from_folder(pieces / "tokenizer")


@pytest.fixture(scope="module")
def oracle(pieces):
    return T5Tokenizer.from_pretrained(pieces, extra_ids=EXTRA_IDS)


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(CORPUS + "<>/s_0extraid"))
def test_the_sentencepiece_model_becomes_the_tokenizer_of_transformers(converted, oracle, text):
    assert converted.encode(text, 10_000)[0] == oracle(text).input_ids


def test_special_pieces_and_sentinels_have_the_ids_of_transformers(converted, oracle):
    text = "a <extra_id_0> cat</s> <extra_id_3> <pad> <unk>"
    ids = converted.encode(text, 100)[0]
    assert ids == oracle(text).input_ids
    assert max(ids) == len(oracle) - 1


def test_a_tokenizer_that_is_there_is_copied(pieces, converted, tmp_path):
    write_t5_tokenizer(pieces / "tokenizer", tmp_path / "copy")
    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["tokenizer.json"]
    json_of = "tokenizer/tokenizer.json"
    assert (tmp_path / "copy/tokenizer.json").read_bytes() == (pieces / json_of).read_bytes()


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_sentencepiece_model_is_named(pieces, tmp_path, damage):
    data = (pieces / "spiece.model").read_bytes()
    broken = {"cut": data[:-5], "empty": b"", "noise": b"\xff" * 40}[damage]
    (tmp_path / "spiece.model").write_bytes(broken)
    with pytest.raises(CheckpointError) as error:
        write_t5_tokenizer(tmp_path, tmp_path / "tokenizer")
    assert str(error.value) == (
        f"{tmp_path}/spiece.model: expected a sentencepiece model with an unknown piece and </s>, "
        "got one without, or damaged. Fetch the checkpoint again."
    )


# ---- the encoder


def test_an_encoder_and_its_tokenizer_are_found(checkpoint):
    folder = write_t5(checkpoint)
    opened = load_magi_checkpoint(checkpoint)
    assert opened.tokenizer == folder
    check_tensors("text_encoder", opened.text_encoder.tensors, _expected(opened))
    described = MAGI_FAMILY.describe(opened, None)["text_encoder"]
    assert described == {
        "layers": 2, "dim": 32, "relative_buckets": 32, "relative_max_distance": 128,
        "max_tokens": 64,
    }  # fmt: skip
    assert not {"text_encoder", "tokenizer"} & MAGI_FAMILY.missing(opened).keys()
    assert [table.name for table in MAGI_FAMILY.tables(opened)] == ["null_text", "text_embed"]
    assert count_steps(opened) == 19 + 2 * 2 + 3 + 1  # two components, three files, a table


def test_torch_files_in_shards_are_read_like_safetensors(checkpoint):
    folder = write_t5(checkpoint)
    stored = load_file(folder / "model.safetensors")
    write_shards(folder)
    opened = load_magi_checkpoint(checkpoint)
    tensors = opened.text_encoder.tensors
    check_tensors("text_encoder", tensors, _expected(opened))
    assert all(torch.equal(tensors.load(name), stored[name]) for name in stored)


def test_a_missing_torch_file_is_named(checkpoint):
    first, second = write_shards(write_t5(checkpoint))
    second.unlink()
    with pytest.raises(CheckpointError) as error:
        load_magi_checkpoint(checkpoint)
    assert str(error.value) == (
        f"{second}: expected 2 shards, got no such file. Fetch the checkpoint again."
    )
    first.unlink()
    with pytest.raises(CheckpointError, match=r"expected weights in .*safetensors, got none"):
        load_magi_checkpoint(checkpoint)


def test_an_encoder_of_another_width_is_refused(checkpoint):
    folder = write_t5(checkpoint, channels=48)
    with pytest.raises(CheckpointError) as error:
        load_magi_checkpoint(checkpoint)
    assert str(error.value) == (
        f"{folder}/config.json: expected d_model 32, for which the transformer was trained, got "
        "48. Take the folder from where the transformer comes from."
    )


def test_another_encoder_is_refused(checkpoint):
    file = write_t5(checkpoint) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "umt5"}))
    with pytest.raises(CheckpointError, match=r"expected model_type t5, for which .* got umt5\. "):
        load_magi_checkpoint(checkpoint)


def test_an_encoder_without_tokenizer_says_what_follows(checkpoint):
    (write_t5(checkpoint) / "spiece.model").unlink()
    opened = load_magi_checkpoint(checkpoint)
    assert opened.tokenizer is None
    missing = MAGI_FAMILY.missing(opened)
    assert missing["tokenizer"] == "t5/t5-v1_1-xxl has none; generate from --prompt-embeds"
    assert "text_encoder" not in missing


def _expected(opened):
    return expected_tensors(opened)["text_encoder"]
