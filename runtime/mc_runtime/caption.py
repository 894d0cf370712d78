"""Cleans a prompt as the captions were cleaned that MAGI-1 was trained with.

The captions came from the web, and so the rules are about addresses, files, markup and the words of
shops. Neighbours: `encode_prompt` cleans with it where the family says so.

Source: DeepFloyd IF's cleaning, as SandAI-org/MAGI-1 6ff822e, inference/model/t5 has it; its
markup is taken out by the parser of the standard library here.
"""

__all__ = ["clean_caption"]

import html
import re
from html.parser import HTMLParser
from urllib.parse import unquote_plus

import ftfy

_HOST = r"[a-zA-Z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_START = r"(?:/{1,3}|[a-zA-Z0-9%])"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_SIGNS = "\u00ae\u2022\u00a9\u2122\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7"
_SILENT = "script", "style", "template"  # elements whose content is no text

# Pairs of a pattern and what replaces it, in the order in which they apply.
_ADDRESSES = [
    ("<person>", "person"),
    (rf"\b(?:https?:{_START}|{_HOST})", ""),
    (rf"\b(?:www:{_START}|{_HOST})", ""),
]
_CHARACTERS = [
    (r"@\w+\b", ""),
    ("[\u31c0-\u9fff]+", ""),  # Chinese characters, and all that stands with them
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (
        "[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\\[\\]{}|\\\\/*]+",
        " ",
    ),
    (r"\s+\.\s+", " "),
]
_WORDS = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    ("^[\"']([\\w\\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]
_JOINED = 3  # words may be joined by so many hyphens and underscores


def clean_caption(prompt: str) -> str:
    r"""Put a prompt into the form of the captions: lower case, plain punctuation, no addresses.

    Args:
        prompt: The text as the user gave it.

    Returns:
        The text that is tokenised. What one pass uncovers is cleaned by a second.

    Example:
        >>> clean_caption("  A <b>Cat</b> &amp; a\tDog, see https://cats.com/42 (HD) ")
        'a cat a dog, see hd'
    """
    return _clean_once(_clean_once(prompt))


def _clean_once(caption: str) -> str:
    caption = unquote_plus(caption).strip().lower()
    caption = _apply(_CHARACTERS, _text_of(_apply(_ADDRESSES, caption)))
    if len(re.findall(r"[-_]", caption)) > _JOINED:
        caption = re.sub(r"[-_]", " ", caption)
    caption = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    return _apply(_WORDS, caption).strip()


def _apply(rules: list[tuple[str, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


class _Text(HTMLParser):
    """Collects what is neither markup nor a script."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in _SILENT

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in _SILENT and self._silent > 0

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)


def _text_of(markup: str) -> str:
    parser = _Text()
    parser.feed(markup)
    parser.close()
    return "".join(parser.parts)
