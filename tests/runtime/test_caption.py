"""The cleaning of captions, beside diffusers', which is that of the original."""

import html
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from diffusers import PixArtAlphaPipeline
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mc_runtime.caption import clean_caption


class Markup(HTMLParser):
    """In place of the library that diffusers takes the text out of markup with."""

    def __init__(self, markup, features):
        assert features == "html.parser"
        super().__init__()
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_data(self, data):
        self.text += data


def unescape(text):
    """The original cuts white space off here, diffusers does not."""
    return html.unescape(text).strip()


@pytest.fixture(scope="module")
def clean():
    """diffusers' cleaning, twice as in the original."""
    module = pipeline_pixart_alpha
    pipeline = SimpleNamespace(bad_punct_regex=PixArtAlphaPipeline.bad_punct_regex)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BeautifulSoup", Markup, raising=False)
        patch.setattr(module, "html", SimpleNamespace(unescape=unescape))

        def once(text):
            return PixArtAlphaPipeline._clean_caption(pipeline, text)

        yield lambda text: once(once(text))


PIECES = [
    *("a", "Cat", "dog", " ", "  ", "\n", "\\n", "-", "_", "--", ".", "..", " . ", ",", ":", " : "),
    *("http://", "https://x.com/a-b", "www:", "cats.org", "mail@cats.it", "@me", "+", "%20"),
    *("<b>", "</b>", "<3", "<person>", "&amp;", "&quot", "&amp;lt;", "\u4e00\u732b", "\u2014"),
    *("\u00ab", "\u2019", "'", '"', "''", "10.0.0.1", "3:15  ", "#12", "#123456", "1234567"),
    *("cat.png", "mp4", "jpg images", "(", ")", "*", "/", "|", "\\", "ab123", "a1b", "1a2"),
    *("x2y3z", "4x4", "2.5\u00d73", "free shipping", "worldwide free shipping", "download free"),
    *("click on it", "page 3", "\u0445", "\u00e9", "caf\u00c3\u00a9", "'quoted'", "\u30a0"),
    *("\u2122", "1", "7", "~", "\u0130"),
]  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=30))
@example("a cat, a dog and 2 birds at https://cats.com/best_cats.html?x=1")
@example("one-two-three-four-five_six")
def test_cleaning_equals_diffusers(clean, text):
    assert clean_caption(text) == clean(text)


def test_plain_prompts_stay():
    prompt = "a red circle drifts left over sand, and waves roll in: slowly"
    assert clean_caption(prompt) == prompt


@pytest.mark.parametrize("name", ["script", "style", "template"])
def test_scripts_are_no_text(name):
    assert clean_caption(f"a cat <{name}>var x</{name}> walks </{name}>") == "a cat walks"
