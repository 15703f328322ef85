"""Escaping of untrusted text from checkpoints, data and the Hub for terminals, Markdown and spreadsheets."""

import re
import sys
import unicodedata
from contextlib import suppress
from typing import Any

_MARKDOWN = re.compile(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))")
_JOINERS = "\u200c\u200d"  # used by Persian, Indic scripts and emoji
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str, lines: bool = False) -> str:
    """Return `text` without control characters, which a terminal would interpret. lines: whether to keep line breaks and tabs."""
    if text.isprintable():
        return text
    kept = _JOINERS + ("\n\t" if lines else "")
    return "".join(sign if sign in kept or _is_shown(sign) else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _is_shown(sign: str) -> bool:
    return sign.isprintable() or unicodedata.category(sign) == "Zs"  # Python counts non-ASCII spaces as not printable


def say(line: str) -> None:
    """Print a line of progress to stderr, without control characters."""
    with suppress(UnicodeEncodeError):
        print(printable(line, lines=True), file=sys.stderr, flush=True)
        return
    print(line.encode("ascii", "replace").decode(), file=sys.stderr, flush=True)


def markdown(text: str) -> str:
    """Return `text` as one line of Markdown that renders literally, without headings, links, code, HTML or table cells."""
    line = _MARKDOWN.sub(r"\\\1", _one_line(text))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^([#+-]|\d+[.)])(?=\s)", r"\\\1", line)


def code(text: str) -> str:
    """Return `text` as one line that can be put between two backticks."""
    return _one_line(text).replace("`", "'")


def fence(text: str) -> str:
    """Return a fence of backticks longer than any run of backticks in `text`."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def csv_cell(value: Any) -> Any:
    """Return a cell that no spreadsheet runs as a formula: text that looks like one gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
