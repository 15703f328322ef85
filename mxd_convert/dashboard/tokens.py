"""The strings of the tokens that a dashboard shows, numbered so that each is written once."""

import functools
import re
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Tokens:
    """The numbering of a dashboard's tokens, in order of first use. vocabulary: number of token ids."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.texts: list[str] = []
        self._number_V = np.full(vocabulary, -1, dtype=np.int64)

    def number(self, ids: Array) -> Array:
        """Return the numbers of token ids, of any shape, and number new ones."""
        found = np.unique(ids)
        new = found[self._number_V[found] < 0]
        if len(new):
            self._number_V[new] = np.arange(len(self.ids), len(self.ids) + len(new))
            self.ids += new.tolist()
            self.texts += token_texts(self.tokenizer, new.tolist())
        numbers: Array = self._number_V[ids]
        return numbers

    def text(self, numbers: list[int]) -> str:
        """Return the text of numbered tokens."""
        return "".join(self.texts[number] for number in numbers)


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return the text of each token within a sentence, with its leading space.

    Tokens that are only some bytes of a character are shown as these bytes: <E2 80>.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]  # some decoders drop the space of a text's first token
    settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(anchor, **settings)
    spelt = tokenizer.convert_ids_to_tokens(ids)
    decoded = tokenizer.batch_decode([[*anchor, token] for token in ids], **settings)
    texts = []
    for text, raw in zip(decoded, spelt, strict=True):
        plain = text.removeprefix(before)
        texts.append(plain if plain and "\ufffd" not in plain else _bytes(raw or ""))
    return texts


def _bytes(raw: str) -> str:
    """Return the bytes of a vocabulary entry as hexadecimal if it spells bytes, else the entry unchanged."""
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", raw):  # sentencepiece
        return f"<{match[1]}>"
    known = _spellings()
    if raw.isascii() or any(sign not in known for sign in raw):
        return raw
    return f"<{' '.join(f'{known[sign]:02X}' for sign in raw)}>"


@functools.cache
def _spellings() -> dict[str, int]:
    """Return the byte of each character in GPT-2's byte-level alphabet. Bytes that don't print are code points from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(rest)}
