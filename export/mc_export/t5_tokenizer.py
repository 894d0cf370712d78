"""Write the tokenizer of T5 into a bundle: as it is, or made from its sentencepiece model.

T5 was released with `spiece.model`, which takes a library to read; the runtime takes the
`tokenizer.json` that says the same. Neighbours: `magi_family` asks for it, `mc_runtime.text` reads
it.

Source: sentencepiece_model.proto of google/sentencepiece (numbers of the fields), and the encoding
of protocol buffers.
"""

__all__ = ["has_t5_tokenizer", "write_t5_tokenizer"]

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from mc_engines.errors import CheckpointError
from mc_export.checkpoint import read_json

_JSON, _MODEL, _CONFIG = "tokenizer.json", "spiece.model", "tokenizer_config.json"
_END = "</s>"
_EXTRA_IDS = 100  # sentinels behind the pieces, where the configuration does not say
_PIECES, _NORMALIZER = 1, 3  # of the model
_TEXT, _SCORE, _TYPE = 1, 2, 3  # of a piece
_UNKNOWN, _CONTROL = 2, 3  # types of pieces
_CHARACTERS = 2  # of the normalizer: its table
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # how a field is encoded


def has_t5_tokenizer(folder: Path) -> bool:
    """Say whether a folder holds a tokenizer that `write_t5_tokenizer` takes."""
    return any((folder / name).is_file() for name in (_JSON, _MODEL))


def write_t5_tokenizer(folder: Path, target: Path) -> None:
    """Write the `tokenizer.json` of a T5: the one that is there, or one made of `spiece.model`.

    Args:
        folder: With `tokenizer.json`, or with `spiece.model`.
        target: To write to; made.

    Raises:
        CheckpointError: The model is damaged, or another tokenizer's.
    """
    target.mkdir()
    if (folder / _JSON).is_file():
        shutil.copyfile(folder / _JSON, target / _JSON)
    else:
        _convert(folder).save(str(target / _JSON))


def _convert(folder: Path) -> Tokenizer:
    file = folder / _MODEL
    try:
        pieces, characters = _read_model(file.read_bytes())
        types = [kind for _, _, kind in pieces]
        unknown, end = types.index(_UNKNOWN), [text for text, _, _ in pieces].index(_END)
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(
            f"{file}: expected a sentencepiece model with an unknown piece and {_END}, got one "
            "without, or damaged. Fetch the checkpoint again."
        ) from error
    special = [text for text, _, kind in pieces if kind in (_UNKNOWN, _CONTROL)]
    config = folder / _CONFIG
    extra = read_json(config).get("extra_ids", _EXTRA_IDS) if config.is_file() else _EXTRA_IDS
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(extra))]
    scored = [(text, score) for text, score, _ in pieces] + [(text, 0.0) for text in sentinels]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=unknown))
    if characters:
        tokenizer.normalizer = normalizers.Precompiled(characters)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, end)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False) for text in (*special, *sentinels)]
    )
    return tokenizer


def _read_model(data: bytes) -> tuple[list[tuple[str, float, int]], bytes]:
    """The pieces with score and type, and the table of characters of the normalizer."""
    pieces, characters = [], b""
    for number, value in _fields(data):
        if number == _PIECES:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[_SCORE])[0] if _SCORE in piece else 0.0
            kind = piece[_TYPE][0] if _TYPE in piece else 1
            pieces.append((piece.get(_TEXT, b"").decode(), score, kind))
        elif number == _NORMALIZER:
            characters = dict(_fields(value)).get(_CHARACTERS, b"")
    return pieces, characters


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message by number; of a number its bytes as they are encoded."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, end = _varint(data, at)
        elif kind == _BYTES:
            size, at = _varint(data, at)
            end = at + size
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            end = at + (8 if kind == _EIGHT_BYTES else 4)
        else:
            raise ValueError(f"field {number}: expected a known encoding, got {kind}.")
        if end > len(data):
            raise ValueError(f"field {number}: expected {end - at} bytes, got {len(data) - at}.")
        yield number, data[at:end]
        at = end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if not data[at - 1] & 0x80:
            return value, at
