"""Prompts in a file: which lines count, and what is refused."""

import pytest

from mc_runtime.prompts import read_prompts


def test_prompts_are_the_lines_that_say_something_each_once(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# what to show\ngrüner Vogel\n\n  a fish \na fish\n", encoding="utf-8")
    assert read_prompts(path) == ("grüner Vogel", "a fish")
    path.write_text("a bird\n a bird \n#a fish\n")
    assert read_prompts(path) == ("a bird",)
    with pytest.raises(ValueError) as error:
        read_prompts(path, least=2)
    assert str(error.value) == (
        f"{path}: expected different prompts, one per line, at least 2, got 1. Write more."
    )


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="expected a text file in UTF-8, got: ") as error:
        read_prompts(path)
    assert str(error.value).endswith(". Write one prompt per line.")
