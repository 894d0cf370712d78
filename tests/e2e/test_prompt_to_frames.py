"""The whole path from a text to frames, against diffusers' whole pipeline."""

import numpy as np
import pytest

from mc_runtime.options import GenerationOptions

OPTIONS = GenerationOptions(
    num_frames=37, height=32, width=48, num_inference_steps=6, addnoise_condition=0
)
LONG = "a very long story " * 40


@pytest.fixture
def noise():
    return np.random.default_rng(5).standard_normal((16, 10, 4, 6), np.float32)


@pytest.mark.parametrize(
    "texts",
    [
        {"prompt": "a cat walks on grass", "negative_prompt": "blurry, static"},
        {"prompt": " Caf\u00e9 &amp; bar "},
        {"prompt": LONG, "negative_prompt": ""},
    ],
)
def test_frames_equal_those_of_diffusers(tiny, tiny_checkpoint, diffusers, noise, texts):
    result = tiny.run(options=OPTIONS, latents=noise, note=lambda text: None, **texts)
    frames = diffusers(tiny_checkpoint).run(OPTIONS, noise, output_type="np", **texts)
    expected = np.rint(frames * 255)
    assert result.frames.shape == expected.shape == (37, 32, 48, 3)
    assert expected.std() > 10
    assert np.abs(result.frames - expected).max() <= 1


def test_a_prompt_that_is_cut_says_so(tiny, noise):
    notes = []
    tiny.generate(LONG, options=OPTIONS, latents=noise, note=notes.append)
    assert notes == ["prompt: expected at most 512 tokens, got 721. The last 209 were cut."]


def test_a_prompt_that_is_cut_warns_where_nobody_listens(tiny, noise):
    with pytest.warns(UserWarning, match=r"negative_prompt: .* The last 209 were cut"):
        tiny.generate("a cat", negative_prompt=LONG, options=OPTIONS, latents=noise)


def test_chunks_come_as_they_are_finished(tiny, noise):
    """What a caller sees of a run: chunks in order, their frames, their costs, the progress."""
    rows = []
    arguments = dict(options=OPTIONS, latents=noise, callback=rows.append)
    chunks = []
    for chunk in tiny.generate("a cat", **arguments):
        assert chunk.index == len(chunks)
        chunks.append((chunk, len(rows)))
    first, last = (chunk for chunk, _ in chunks)
    assert [len(chunk.frames) for chunk in (first, last)] == [17, 20]
    assert {chunk.of for chunk in (first, last)} == {2}
    assert all(0 < chunk.decode_seconds <= chunk.seconds for chunk in (first, last))
    # 6 steps of a chunk in 2 branches; the first chunk's clean pass counts for the second.
    tokens = 5 * 2 * 3
    assert first.computed["full"] + last.computed["full"] == 24
    assert "clean" not in first.computed and last.computed["clean"] == 2
    assert first.computed["tokens"] + last.computed["tokens"] == (24 + 2) * tokens
    # 5 rows of lag and 6 steps: the first chunk is out after row 6 of 11.
    assert [at for _, at in chunks] == [6, 11]
    assert [row.row for row in rows] == list(range(1, 12))
    assert {(row.rows, row.chunks) for row in rows} == {(11, 2)}
    assert [row.chunk for row in rows] == [0] * 6 + [1] * 5
