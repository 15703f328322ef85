"""Documents tokenised into flat files: token ids, and which tokens are the prompts of chats."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mxd_convert.data.chats import Document
from mxd_convert.files import replacing

_BATCH = 256  # documents tokenised at a time
_CHARACTERS = 4  # characters per token, roughly: pending documents are tokenised when they may reach the limit


@dataclass(frozen=True)
class Separators:
    """Token ids that go before and after every document, the id of the BOS token, if any, and those of all special tokens."""

    before: list[int]
    after: list[int]
    bos: int | None
    special: list[int] = field(default_factory=list)


def separators(tokenizer: Any) -> Separators:
    """Return the special tokens that the tokenizer adds by default; if none, BOS before or else EOS after each document."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    everything = special_ids(tokenizer)
    plain, special = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    start = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), None)
    if start is not None and len(special) > len(plain):
        return Separators(special[:start], special[start + len(plain) :], special[0] if start else bos, everything)
    if bos is not None:
        return Separators([bos], [], bos, everything)
    return Separators([], [eos] if eos is not None else [], None, everything)


def special_ids(tokenizer: Any) -> list[int]:
    """Return the ids of all special tokens, in order: those with a role, such as EOS, and those that chat templates write."""
    added = tokenizer.added_tokens_decoder.items()  # some of them are in no list of the tokenizer
    return sorted({*tokenizer.all_special_ids, *(number for number, token in added if token.special)})


class TokenWriter:
    """Tokenises documents into one flat file of at least `limit` tokens, whole documents only, with counts and fingerprint.

    Chats get no separators: the chat template has written them. A second file has a byte per token, 1 in the prompts of chats. It
    stays empty without chats.
    """

    def __init__(self, file: BinaryIO, prompts: BinaryIO, tokenizer: Any, marks: Separators, limit: int) -> None:
        self.file, self.prompts = file, prompts
        self.tokenizer, self.marks, self.limit = tokenizer, marks, limit
        self.dtype = token_dtype(len(tokenizer))
        self.documents = self.tokens = self.characters = 0
        self.has_chats = False
        self.digest, self.file_digest, self.prompts_digest = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        self.seen: set[bytes] = set()  # hashes of the documents written
        self.pending: list[Document] = []
        self.starts: list[int] = []  # offset of each document, in tokens

    def full(self) -> bool:
        """Return whether the limit is reached."""
        return self.tokens >= self.limit

    def add(self, document: Document) -> None:
        """Add a document. It is written with the next batch."""
        self.pending.append(document)
        self.characters += len(document)
        if len(self.pending) >= _BATCH or self.characters > _CHARACTERS * (self.limit - self.tokens):
            self.flush()

    def flush(self) -> None:
        """Tokenise and write the pending documents, up to the limit."""
        if self.pending and not self.full():
            chats = any(document.prompts is not None for document in self.pending)
            plain = [str(document) for document in self.pending]
            encoded = self.tokenizer(plain, add_special_tokens=False, verbose=False, return_offsets_mapping=chats)
            for number, document in enumerate(self.pending):
                if self.full():
                    break
                ids = encoded["input_ids"][number]
                if document.prompts is None:
                    ids = [*self.marks.before, *ids, *self.marks.after]
                self._write(document, np.asarray(ids, dtype=self.dtype), encoded["offset_mapping"][number] if chats else [])
        self.pending, self.characters = [], 0

    def _write(self, document: Document, ids: np.ndarray[Any, Any], offsets: list[tuple[int, int]]) -> None:
        """Write a document's tokens. offsets: the characters (start, end) of each token of a chat."""
        self._put(self.file, self.file_digest, ids.tobytes())
        if document.prompts is not None:
            if not self.has_chats:
                self._put(self.prompts, self.prompts_digest, bytes(self.tokens))
            self.has_chats = True
            self._put(self.prompts, self.prompts_digest, _in_prompts(offsets, document.prompts).tobytes())
        elif self.has_chats:
            self._put(self.prompts, self.prompts_digest, bytes(len(ids)))
        self.starts.append(self.tokens)
        self.tokens += len(ids)
        self.documents += 1
        text = document.encode()
        self.digest.update(len(text).to_bytes(8, "little") + text)
        self.seen.add(hashlib.sha256(text).digest()[:16])

    def _put(self, file: BinaryIO, digest: Any, content: bytes) -> None:
        file.write(content)
        digest.update(content)


def _in_prompts(offsets: list[tuple[int, int]], prompts: tuple[tuple[int, int], ...]) -> np.ndarray[Any, Any]:
    """Return for each token whether it begins in a prompt, (tokens) uint8."""
    begins = np.asarray([start for start, _ in offsets], dtype=np.int64)
    found = np.zeros(len(begins), dtype=np.uint8)
    for start, end in prompts:
        found |= (begins >= start) & (begins < end)
    return found


@contextmanager
def writing_tokens(path: Path, tokenizer: Any, marks: Separators, limit: int) -> Iterator[TokenWriter]:
    """Yield a writer of a token file and of its prompts, which appear at `path` and `prompts_of(path)` when the block succeeds."""
    with (
        replacing(path) as temporary,
        replacing(prompts_of(path)) as beside,
        temporary.open("wb") as file,
        beside.open("wb") as prompts,
    ):
        writer = TokenWriter(file, prompts, tokenizer, marks, limit)
        yield writer
        writer.flush()


def prompts_of(path: Path) -> Path:
    """Return the file of the prompts of a token file."""
    return path.with_suffix(".prompts")


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """Return the smaller of uint16 and uint32 that fits all token ids."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
