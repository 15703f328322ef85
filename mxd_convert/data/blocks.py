"""Packed blocks of tokens on disk, with a fingerprint.

Documents are split by content into training and held-out text, tokenised, and joined with the tokenizer's separators. Each text
is written to one flat file of token ids. Training reads blocks from the file in a random order that depends only on the seed, so
an interrupted run can resume at any block.

Shape suffixes: B blocks, T tokens of a block.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxd_convert.data.chats import Document
from mxd_convert.data.documents import HELD_OUT_SHARE, is_held_out, read_documents
from mxd_convert.data.token_files import Separators, TokenWriter, prompts_of, separators, token_dtype, writing_tokens
from mxd_convert.errors import InputError
from mxd_convert.files import file_sha256, read_sealed, replacing, write_sealed
from mxd_convert.recipe.texts import Data, EvalText

# Tokens of training text to read at least, so that a short run draws its blocks from many documents and not from the first few.
MIN_TOKENS = 4_000_000
MANY_PASSES = 2  # over the training text: longer training warns
# of a token: text; another special token; BOS; the first position of a block, which is an attention sink in many models
TOKEN_KINDS = ("text", "special", "bos", "first")
MANIFEST = "data.json"  # description and hashes of the other files
STARTS = "eval.starts"  # offset of each document of the evaluation text in its token file, int64
FILES = ("train.tokens", "train.prompts", "eval.tokens", "eval.prompts", STARTS)


@dataclass(frozen=True)
class TextInfo:
    """Description of a text, as in the report.

    Attributes:
        path: Hub dataset, or name of the local file or folder.
        fingerprint: SHA-256 of the documents read, each preceded by its length in bytes.
        tokens: number of tokens read.
        documents: number of documents read.
        held_out_share: share of the documents that was held out of the training text; None for other texts.
        dropped_overlap: number of training documents that were dropped because they are in the evaluation text too.
        disjoint: whether no document of a held-out text is in the training text; None if unknown.
    """

    path: str
    fingerprint: str
    tokens: int
    documents: int
    held_out_share: float | None = None
    dropped_overlap: int = 0
    disjoint: bool | None = None


@dataclass(frozen=True)
class Blocks:
    """A text as blocks of token ids, (blocks, context), memory-mapped from disk.

    starts: for an evaluation text, the offset of each document in tokens; None for a training text.
    special: ids of the special tokens.
    prompts: whether a token is in the prompt of a chat, (blocks, context); None without chats.
    """

    ids: np.ndarray[Any, np.dtype[Any]]
    bos: int | None
    info: TextInfo
    starts: np.ndarray[Any, np.dtype[Any]] | None = None
    special: tuple[int, ...] = ()
    prompts: np.ndarray[Any, np.dtype[Any]] | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def context(self) -> int:
        """Return the length of a block in tokens."""
        return int(self.ids.shape[1])

    def take(self, rows: np.ndarray[Any, Any] | slice) -> Tensor:
        """Return the blocks of some rows, (rows, context), int64."""
        return torch.from_numpy(np.asarray(self.ids[rows], dtype=np.int64))

    @property
    def documents(self) -> int:
        """Return the number of documents of which the blocks have a token, for an evaluation text."""
        assert self.starts is not None
        return int(np.searchsorted(self.starts, self.ids.size))

    def document_of(self, rows: np.ndarray[Any, Any] | slice) -> Tensor:
        """Return the number of the document of each token of some rows, (rows, context), for an evaluation text."""
        assert self.starts is not None
        first_B = np.arange(len(self))[rows] * self.context
        at_BT = first_B[:, None] + np.arange(self.context)
        return torch.from_numpy(np.searchsorted(self.starts, at_BT, side="right") - 1)

    def counted(self, rows: np.ndarray[Any, Any] | slice, mask: str) -> Tensor:
        """Return which positions of some rows count in losses and figures, (rows, context) bool.

        mask: the recipe's `train.mask`.
        """
        ids_BT = np.asarray(self.ids[rows])
        counted_BT = np.ones(ids_BT.shape, dtype=bool)
        if mask != "none":
            counted_BT[:, 0] = False
            if self.bos is not None:
                counted_BT &= ids_BT != self.bos
        if mask == "special":
            counted_BT &= ~np.isin(ids_BT, self.special)
        if mask == "prompt" and self.prompts is not None:
            counted_BT &= self.prompts[rows] == 0
        return torch.from_numpy(counted_BT)

    def kinds(self, rows: np.ndarray[Any, Any] | slice) -> Tensor:
        """Return the kind of each token of some rows, (rows, context): its index in TOKEN_KINDS."""
        ids_BT = np.asarray(self.ids[rows])
        kinds_BT = np.zeros(ids_BT.shape, dtype=np.int64)
        kinds_BT[np.isin(ids_BT, self.special)] = TOKEN_KINDS.index("special")
        if self.bos is not None:
            kinds_BT[ids_BT == self.bos] = TOKEN_KINDS.index("bos")
        kinds_BT[:, 0] = TOKEN_KINDS.index("first")
        return torch.from_numpy(kinds_BT)


@functools.lru_cache(maxsize=2)
def _epoch_order(blocks: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([seed, epoch]).permutation(blocks)


def block_order(blocks: int, start: int, count: int, seed: int) -> np.ndarray[Any, Any]:
    """Return rows `start` to `start + count` of an endless order: all blocks in random order, then all again in another order."""
    rows = []
    while count > 0:
        epoch, offset = divmod(start, blocks)
        order = _epoch_order(blocks, seed, epoch)[offset : offset + count]
        rows.append(order)
        start, count = start + len(order), count - len(order)
    return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)


def prepare(data: Data, tokenizer: Any, folder: Path, notify: Callable[[str], None] = lambda line: None) -> tuple[Blocks, Blocks]:
    """Return the training and evaluation blocks of a recipe.

    The texts are tokenised into `folder`. A later call reads the token files from there, and tokenises the texts again if a file
    is damaged. At least MIN_TOKENS tokens of the training text are read, if it has that many.

    Args:
        data: section `data` of the recipe.
        tokenizer: tokenizer of the base model.
        folder: folder of the token files.
        notify: called with each progress message.

    Raises:
        InputError: if a text is empty or shorter than a block, if a single document leaves nothing to hold out, or if a text that
            must be tokenised again has changed.
    """
    manifest = folder / MANIFEST
    marks = separators(tokenizer)
    recorded = read_sealed(manifest)
    found = _hashes(folder) if manifest.exists() else {}
    if recorded is None or recorded["files"] != found or found.keys() != set(FILES):
        before = found if recorded is None else recorded["files"]
        damaged = [name for name in FILES if name not in found or found[name] != before.get(name)] or [MANIFEST]
        if manifest.exists():
            notify(f"{folder.name}/{damaged[0]} is damaged. Reading the text again.")
        folder.mkdir(parents=True, exist_ok=True)
        recorded = _tokenise(data, tokenizer, marks, folder, notify)
        made = recorded["files"]
        write_sealed(manifest, {**recorded, "files": {**made, **before}})
        if any(made[name] != before[name] for name in before):
            raise InputError(
                f"data: {data.train.shown}: {folder / damaged[0]} is damaged, and the text no longer gives the tokens of this run."
                " Restore the text, or use --fresh to start over."
            )
    dtype = token_dtype(len(tokenizer))
    limits = (-(-tokens_to_read(data) // data.context), data.eval.tokens // data.context)
    train, held_out = (
        _open(folder / f"{name}.tokens", dtype, data.context, limit, marks, TextInfo(**recorded[name]))
        for name, limit in zip(("train", "eval"), limits, strict=True)
    )
    return train, replace(held_out, starts=np.fromfile(folder / STARTS, dtype=np.int64))


def _hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each existing token file, by file name."""
    return {name: file_sha256(folder / name) for name in FILES if (folder / name).is_file()}


def check_vocabulary(ids: Any, vocabulary: int) -> None:
    """Raise InputError if a token id has no embedding in the model. ids: an array. vocabulary: number of embeddings."""
    largest = int(ids.max())
    if largest >= vocabulary:
        raise InputError(
            f"the tokenizer has token ids up to {largest}, but the model has {vocabulary} embeddings. Use the tokenizer"
            " that the model was trained with."
        )


def prepare_eval(source: EvalText, context: int, tokenizer: Any, folder: Path, held_out: bool = False) -> Blocks:
    """Return the blocks of an evaluation text, up to `source.tokens` tokens.

    held_out: use only the documents that a run holds out of the text. Raises InputError if the text is shorter than a block.
    """
    marks = separators(tokenizer)
    with writing_tokens(folder / "eval.tokens", tokenizer, marks, source.tokens) as writer:
        for document in read_documents(source, tokenizer=tokenizer):
            if held_out and not is_held_out(document):
                continue
            writer.add(document)
            if writer.full():
                break
    _check_length(source.where, writer, context)
    info = TextInfo(source.shown, writer.digest.hexdigest(), writer.tokens, writer.documents)
    blocks = _open(folder / "eval.tokens", writer.dtype, context, source.tokens // context, marks, info)
    return replace(blocks, starts=np.asarray(writer.starts, dtype=np.int64))


def tokens_to_read(data: Data) -> int:
    """Return the number of tokens to read from the training text, if it has that many."""
    return max(data.tokens, MIN_TOKENS)


def _tokenise(data: Data, tokenizer: Any, marks: Separators, folder: Path, notify: Callable[[str], None]) -> dict[str, Any]:
    """Write both token files. Return the manifest: the TextInfo of each text, and the SHA-256 of each file."""
    first, second = folder / "train.tokens", folder / "eval.tokens"
    with (
        writing_tokens(first, tokenizer, marks, tokens_to_read(data)) as train,
        writing_tokens(second, tokenizer, marks, data.eval.tokens) as held_out,
    ):
        fill = _fill_separate if data.eval.is_given else _fill_split
        dropped = fill(data, train, held_out, notify)
    _check_length(data.train.where, train, data.context)
    _check_length(data.eval.where or f"the documents held out of {data.train.where}", held_out, data.context)
    if data.tokens > MANY_PASSES * train.tokens:
        notify(
            f"warning: data.tokens: {data.tokens:,} tokens are {data.tokens / train.tokens:.0f} passes over the text, which has"
            f" {train.tokens:,}. Layers may learn it by heart. Add text, or lower data.tokens."
        )
    share = None if data.eval.is_given else HELD_OUT_SHARE
    shown = data.eval.shown or data.train.shown
    apart = train.seen.isdisjoint(held_out.seen)
    infos = (
        TextInfo(data.train.shown, train.digest.hexdigest(), train.tokens, train.documents, None, dropped),
        TextInfo(shown, held_out.digest.hexdigest(), held_out.tokens, held_out.documents, share, disjoint=apart),
    )
    files: dict[str, str] = {}
    for path, writer in ((first, train), (second, held_out)):
        files |= {path.name: writer.file_digest.hexdigest(), prompts_of(path).name: writer.prompts_digest.hexdigest()}
    starts = np.asarray(held_out.starts, dtype=np.int64).tobytes()
    with replacing(folder / STARTS) as temporary:
        temporary.write_bytes(starts)
    files[STARTS] = hashlib.sha256(starts).hexdigest()
    return {"train": asdict(infos[0]), "eval": asdict(infos[1]), "files": files}


def _fill_separate(data: Data, train: TokenWriter, held_out: TokenWriter, notify: Callable[[str], None]) -> int:
    """Fill both files from separate texts. Return the number of training documents dropped, which are in the evaluation text."""
    notify(f"reading {data.eval.shown}")
    seen: set[bytes] = set()
    for document in read_documents(data.eval, notify, train.tokenizer):
        held_out.add(document)
        seen.add(hashlib.sha256(document.encode()).digest())
        if held_out.full():
            break
    held_out.flush()
    notify(f"reading {data.train.shown}")
    dropped = 0
    for document in read_documents(data.train, notify, train.tokenizer):
        if hashlib.sha256(document.encode()).digest() in seen:
            dropped += 1
            continue
        train.add(document)
        if train.full():
            break
    if train.documents == 0 and not train.pending and dropped:
        raise InputError(
            f"data.train: {data.train.where}: all of its {dropped} documents are in the evaluation text too. Use another text for one of them."
        )
    return dropped


def _fill_split(data: Data, train: TokenWriter, held_out: TokenWriter, notify: Callable[[str], None]) -> int:
    """Fill both files from one text, of whose documents a tenth, chosen by content, is held out. Return 0, the number dropped."""
    notify(f"reading {data.train.shown}, holding out a tenth of the documents")
    waiting: list[Document] = []  # until both files have a document: all of a few documents may belong to one file
    started = False
    for document in read_documents(data.train, notify, train.tokenizer):
        if started:
            (held_out if is_held_out(document) else train).add(document)
        else:
            waiting.append(document)
            if is_held_out(document) != is_held_out(waiting[0]):
                started = True
                for text in waiting:
                    (held_out if is_held_out(text) else train).add(text)
        if train.full() and held_out.full():
            break
    if started or not waiting:
        return 0
    moved = min(set(waiting), key=lambda text: hashlib.sha256(text.encode()).digest())
    if all(text == moved for text in waiting):
        raise InputError(
            f"data.train: {data.train.where}: a single document, so none can be held out to evaluate on. Add documents"
            " (in .txt files, blank lines separate them), or set data.eval.path."
        )
    one, rest = (train, held_out) if is_held_out(waiting[0]) else (held_out, train)
    for text in waiting:
        (one if text == moved else rest).add(text)
    return 0


def _check_length(path: str, writer: TokenWriter, context: int) -> None:
    if writer.documents == 0:
        raise InputError(f"data: {path}: the text is empty. Use another text.")
    if writer.tokens < context:
        raise InputError(
            f"data: {path}: {writer.tokens} tokens in {writer.documents} documents are less than one block of {context} tokens."
            " Add text or lower data.context."
        )


def _open(path: Path, dtype: np.dtype[Any], context: int, limit: int, marks: Separators, info: TextInfo) -> Blocks:
    """Return the first `limit` blocks of a token file. It ends with a whole document, and so may contain more."""
    shape = max(1, min(limit, path.stat().st_size // dtype.itemsize // context)), context
    prompts = prompts_of(path)
    return Blocks(
        np.memmap(path, dtype=dtype, mode="r", shape=shape),
        marks.bos,
        info,
        special=tuple(marks.special),
        prompts=np.memmap(prompts, dtype=np.uint8, mode="r", shape=shape) if prompts.stat().st_size else None,
    )
