"""Text and label of a row, with the same rules and errors for every file format."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mxd_convert.errors import InputError
from mxd_convert.escaping import printable
from mxd_convert.files import kind_of

MAX_MISSING = 10_000  # rows at the start of a file without the field, after which the rest is not read
_MAX_NAMES = 12  # names listed in a message
_MESSAGES = ({"role", "content"}, {"from", "value"})  # keys of a chat message, in the two common formats


class TextField:
    """The text field of a source's rows, with a count of the rows without text.

    Args:
        name: name of the field.
        option: recipe key or command-line option that sets the name, for error messages.
        skip: leave out rows without text instead of raising an error.
        chats: accept lists of messages too.
    """

    def __init__(self, name: str, option: str, skip: bool = False, chats: bool = False) -> None:
        self.name, self.option, self.skip, self.chats = name, option, skip, chats
        self.rows = self.without = 0

    def texts(self, rows: Iterable[tuple[str, Any]], source: str) -> Iterator[tuple[str, dict[str, Any], Any]]:
        """Yield (where, row, text) for the rows of a file or dataset. With `chats`, a text may also be a list of messages.

        Args:
            rows: (location, content) pairs.
            source: name of the file or dataset, for error messages.

        Raises:
            InputError: if the field contains something other than text, or no row has the field.
        """
        found = absent = 0
        names: dict[str, None] = {}
        for where, row in rows:
            self.rows += 1
            if not isinstance(row, dict):
                raise InputError(f"data: {where}: holds {holds(row)}; expected a mapping with the field {self.name!r}")
            text = row.get(self.name)
            if text is None:
                self.without += 1
                absent += self.name not in row
                found += self.name in row
                if not found:
                    names.update(dict.fromkeys(row) if len(names) <= _MAX_NAMES else {})
                    if absent == MAX_MISSING:
                        break
                elif not self.skip:
                    raise self._without_text(where, row)
                continue
            if not isinstance(text, str) and not (self.chats and _is_chat(text)):
                raise InputError(f"data: {where}: no text in the field {self.name!r}: it holds {holds(text)}. {self._fix(text)}")
            if absent and not self.skip:
                raise self._without_text(f"{source}, before {where}", {})
            found += 1
            yield where, row, text
        if absent and not found:
            raise missing(self.name, source, list(names), self.option)

    def _without_text(self, where: str, row: Mapping[str, Any]) -> InputError:
        what = "it holds null" if self.name in row else "a row lacks it"
        return InputError(
            f"data: {where}: no text in the field {self.name!r}: {what}. Remove such rows from the data, or set `missing: skip` next to"
            " the text's path in the recipe to leave them out."
        )

    def check(self, source: str) -> None:
        """Raise InputError if no row had text. To be called after all rows are read."""
        if self.rows and self.without == self.rows:
            raise InputError(
                f"data: {source}: no text in the field {self.name!r}: it is null in all rows, {self.rows:,}."
                f" Name a field that holds text with {self.option}."
            )

    def report(self, source: str, notify: Callable[[str], None]) -> None:
        """Report the number of rows that were left out because they have no text, if any."""
        if self.without:
            notify(f"{source}: {self.without:,} of {self.rows:,} rows have no text in the field {self.name!r} and are left out")

    def _fix(self, content: Any) -> str:
        turn = "Write its text there as a string"
        if isinstance(content, list) and content and _is_message(content[0]):
            turn = (
                'Write each message as {"role": "user", "content": "..."}'
                if self.chats
                else "Write each conversation as one string"
            )
        return f"{turn}, or name a field that holds text with {self.option}."


def label_of(row: Mapping[str, Any], field: str, where: str) -> str:
    """Return the class of a row, from a label that is text or a whole number.

    3.0 counts as 3, because pandas writes whole numbers like this if the column has nulls. Raises InputError for other labels.
    """
    if field not in row:
        raise InputError(
            f"data: {where}: no label in the field {field!r}; its fields are {listed(row)}. Name the field with --label-field."
        )
    label = row[field]
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise InputError(
            f"data: {where}: no label in the field {field!r}: it holds {holds(label)}. A label is text or a whole number."
            " Write one, remove the row, or name another field with --label-field."
        )
    return str(label)


def missing(field: str, source: str, names: Iterable[str], option: str) -> InputError:
    """Return the error for a field that no row of a file or dataset has."""
    return InputError(f"data: {source}: no field {field!r}; its fields are {listed(names)}. Name the field with {option}.")


def holds(content: Any) -> str:
    """Describe a value for an error message, as in "bytes" or "a list of messages (role, content)"."""
    if isinstance(content, Mapping):
        return f"a mapping with the keys {listed(content)}" if content else "an empty mapping"
    if isinstance(content, list) and content:
        first = content[0]
        if isinstance(first, Mapping):
            return f"a list of {'messages' if _is_message(first) else 'mappings'} ({listed(first)})"
        return f"a list that begins with {_kind(first)}"
    return _kind(content)


def _kind(content: Any) -> str:
    if isinstance(content, str):
        return "text" if content.strip() else "empty text"
    if isinstance(content, list) and not content:
        return "an empty list"
    if isinstance(content, bytes | bytearray):
        return "bytes"
    if isinstance(content, bool) or content is None:
        return {True: "true", False: "false", None: "null"}[content]
    if isinstance(content, float):
        return "NaN" if math.isnan(content) else f"the number {content:g}"
    return kind_of(content)


def _is_chat(content: Any) -> bool:
    """Return whether a value is a list of messages in the format that chat templates take, with `role` and `content`."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(one, Mapping) and one.keys() & {"role", "content"} for one in content)
    )


def _is_message(content: Any) -> bool:
    return isinstance(content, Mapping) and any(keys <= content.keys() for keys in _MESSAGES)


def listed(names: Iterable[Any], most: int = _MAX_NAMES) -> str:
    """Join names from untrusted data for an error message: at most `most` names, long ones cut, control characters replaced."""
    everything = [str(name) for name in names]
    shown = [printable(name if len(name) <= 60 else name[:57] + "...") for name in everything[:most]]
    rest = len(everything) - len(shown)
    return ", ".join(shown) + (f" and {rest:,} more" if rest else "")
