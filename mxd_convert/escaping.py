"""Text from checkpoints, data and the Hub, made harmless where it is shown: on a terminal, in Markdown, in a spreadsheet."""

import re
import sys
import unicodedata
from contextlib import suppress
from typing import Any

_MARKDOWN = re.compile(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))")
_JOINERS = "\u200c\u200d"  # of Persian, Indic scripts and emoji
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str, lines: bool = False) -> str:
    """Return `text` without control characters, which a terminal would take for orders. lines: keep line breaks and tabs."""
    if text.isprintable():
        return text
    kept = _JOINERS + ("\n\t" if lines else "")
    return "".join(sign if sign in kept or _is_shown(sign) else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _is_shown(sign: str) -> bool:
    return sign.isprintable() or unicodedata.category(sign) == "Zs"  # spaces of other writing systems are none to Python


def say(line: str) -> None:
    """Print a line about what is going on to stderr, as text."""
    with suppress(UnicodeEncodeError):
        print(printable(line, lines=True), file=sys.stderr, flush=True)
        return
    print(line.encode("ascii", "replace").decode(), file=sys.stderr, flush=True)


def markdown(text: str) -> str:
    """Return `text` as one line of Markdown that shows it as it is: no headings, links, code, HTML or table cells of its own."""
    line = _MARKDOWN.sub(r"\\\1", _one_line(text))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^([#+-]|\d+[.)])(?=\s)", r"\\\1", line)


def code(text: str) -> str:
    """Return `text` for between two backticks."""
    return _one_line(text).replace("`", "'")


def fence(text: str) -> str:
    """Return a fence of backticks longer than any in `text`."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def csv_cell(value: Any) -> Any:
    """Return a cell that no spreadsheet runs as a formula: text that would begin one gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
