"""Chats: lists of messages, rendered as text with the tokenizer's chat template."""

from collections.abc import Sequence
from typing import Any

from mxd_convert.data.fields import holds
from mxd_convert.errors import InputError, first_line

REPLY = "assistant"  # the role whose messages are the model's replies


class Document(str):
    """The text of a document.

    prompts: spans (start, end) of characters that belong to a chat's prompt: all but the replies. None for other texts.
    """

    __slots__ = ("prompts",)
    prompts: tuple[tuple[int, int], ...] | None

    def __new__(cls, text: str, prompts: Sequence[tuple[int, int]] | None = None) -> "Document":
        """Return a document."""
        document = super().__new__(cls, text)
        document.prompts = None if prompts is None else tuple(prompts)
        return document


def rendered(messages: list[dict[str, Any]], tokenizer: Any, where: str) -> Document:
    """Return a chat as text, by the tokenizer's chat template.

    Args:
        messages: mappings with `role` and `content`.
        tokenizer: whose template is used.
        where: the row, for errors.

    Raises:
        InputError: if a message lacks a role or text, or the tokenizer has no template or its template fails.
    """
    _check(messages, tokenizer, where)
    text = _render(messages, tokenizer, where, False)
    return Document(text, _prompts(text, messages, tokenizer, where))


def open_chat(messages: list[dict[str, Any]], tokenizer: Any, where: str) -> str:
    """Return a chat as text that ends where the model's reply begins. Arguments and errors as of `rendered`."""
    _check(messages, tokenizer, where)
    return _render(messages, tokenizer, where, True)


def _check(messages: list[dict[str, Any]], tokenizer: Any, where: str) -> None:
    for number, message in enumerate(messages, 1):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = f"holds {holds(message[key])}" if key in message else "is missing"
                raise InputError(
                    f"data: {where}: message {number} of the chat: its {key!r} {found}; expected text."
                    ' Write each message as {"role": "user", "content": "..."}.'
                )
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"data: {where}: a chat, but the tokenizer has no chat template to render it with. Write each chat as one text, or use an"
            " instruct model's tokenizer."
        )


def _render(messages: list[dict[str, Any]], tokenizer: Any, where: str, opened: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened))
    except Exception as error:  # a template can raise anything
        raise InputError(
            f"data: {where}: the tokenizer's chat template fails ({first_line(error)}). Correct the chat, for example the order of its"
            " roles, or leave it out."
        ) from None


def _prompts(text: str, messages: list[dict[str, Any]], tokenizer: Any, where: str) -> list[tuple[int, int]]:
    """Return the spans of `text` outside of the replies.

    A reply begins where the template has opened it, and ends with its message. If a template renders a part of the chat in another
    way than the whole, the reply is its content alone.
    """
    spans, end = [], 0
    for number, message in enumerate(messages):
        if message["role"] != REPLY:
            continue
        before = _render(messages[:number], tokenizer, where, True) if number else ""
        after = _render(messages[: number + 1], tokenizer, where, False)
        if number and text.startswith(before) and text.startswith(after) and len(before) >= end:
            start, stop = len(before), len(after)
        else:
            start = text.find(message["content"].strip(), end)
            stop = start + len(message["content"].strip())
        if start < end:  # the template left it out
            continue
        spans.append((end, start))
        end = stop
    return [*spans, (end, len(text))]


__all__ = ["Document", "open_chat", "rendered"]
