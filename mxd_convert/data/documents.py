"""Documents from local files and Hub datasets, one at a time, and the rule that selects held-out documents."""

import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from mxd_convert.data.chats import Document, rendered
from mxd_convert.data.fields import TextField, listed, missing
from mxd_convert.errors import InputError, first_line, is_disk_full, is_out_of_memory
from mxd_convert.recipe.section import is_local
from mxd_convert.recipe.texts import EvalText, Source, Text

HELD_OUT_SHARE = 0.1  # share of the documents held out of the training text
PLAIN = (".txt", ".txt.gz")
SUFFIXES = (*PLAIN, ".jsonl", ".jsonl.gz", ".parquet")
MAX_DOCUMENT = 2**22  # characters of a document; longer ones are split, so that no tokenizer gets gigabytes at once
MAX_LINE = 2**26  # characters of a line of a .jsonl file
_BATCH_ROWS = 1024  # rows of a parquet file in memory at a time
_SECRET = re.compile(r"\b(?:hf|api_org)_\w+|(?i:(?<=bearer )\S+)|(?<=://)[^/\s@]+(?=@)|(?<=\?)[^\s'\")]+=[^\s'\")]+")


def is_held_out(text: str) -> bool:
    """Return whether a document belongs to the tenth that is held out if no evaluation text is given.

    This depends only on the document's content, so it is the same in every run and for any order of files, and equal documents
    stay together.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < HELD_OUT_SHARE * 2**64


def local_files(path: str) -> list[Path]:
    """Return the text files that a local path, folder or glob names, sorted. Raises InputError if there are none.

    Hidden files and folders below the path are left out.
    """
    try:
        files = _find(path)
    except OSError as error:
        raise InputError(f"data: {error.filename or path}: can't be read ({error.strerror or error})") from None
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise InputError(f"data: {file}: unknown kind of text file. Use one of {', '.join(SUFFIXES)}.")
    return files


def _find(path: str) -> list[Path]:
    if any(sign in path for sign in "*?[") and not Path(path).exists():
        found: Iterable[Path] = map(Path, glob.glob(path, recursive=True))
        nothing = f"no {', '.join(SUFFIXES)} file matches this glob"
    elif Path(path).is_dir():
        found = _below(Path(path))
        nothing = f"the folder contains no {', '.join(SUFFIXES)} file that is not hidden"
    elif Path(path).is_file():
        return [Path(path)]
    else:
        raise InputError(f"data: {path}: no such file or folder")
    files = sorted(file for file in found if file.name.endswith(SUFFIXES) and file.is_file())
    if not files:
        raise InputError(f"data: {path}: {nothing}")
    once: dict[Path, Path] = {}
    for file in files:
        once.setdefault(file.resolve(), file)  # with links, a file can have several names
    return list(once.values())


def _below(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, except hidden ones. A folder reached by several links is read once."""

    def stop(error: OSError) -> None:
        raise error

    seen = set()
    for current, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        here = os.path.realpath(current)
        folders[:] = [] if here in seen else sorted(name for name in folders if not name.startswith("."))
        if here not in seen:
            yield from (Path(current, name) for name in names if not name.startswith("."))
        seen.add(here)


def read_documents(
    text: Text | EvalText, notify: Callable[[str], None] = lambda line: None, tokenizer: Any = None
) -> Iterator[Document]:
    """Yield the non-empty documents of a text in order, and of several sources in proportion to their weights. Raises InputError.

    A document longer than MAX_DOCUMENT is yielded in pieces.

    Args:
        text: one text or several sources.
        notify: called with a message if rows without text were left out, or a source with a weight ended.
        tokenizer: whose chat template renders chats.
    """
    section = "data.train" if isinstance(text, Text) else "data.eval"
    readers = [_Reader(source, f"{section}.{key}", notify, tokenizer) for key, source in text.entries()]
    try:
        yield from _mixed(readers, notify)
    finally:
        for reader in readers:
            reader.documents.close()  # reports the rows that were left out


def _mixed(readers: Sequence["_Reader"], notify: Callable[[str], None]) -> Iterator[Document]:
    """Yield the documents of several readers, each time of the one that is furthest behind its weight."""
    left = list(readers)
    while left:
        reader = min(left, key=lambda one: one.characters / (one.source.weight or 1.0))
        document = next(reader.documents, None)
        if document is not None:
            reader.characters += len(document)
            yield document
        elif reader.source.weight is not None and len(left) > 1:
            notify(f"{reader.name} has ended. The other sources are read no further, which keeps the weights.")
            return
        else:
            left.remove(reader)


class _Reader:
    """The documents of one source, and the number of characters that they had so far.

    key: of the source in the recipe, with a trailing dot.
    """

    def __init__(self, source: Source, key: str, notify: Callable[[str], None], tokenizer: Any) -> None:
        self.source, self.key, self.notify, self.tokenizer = source, key, notify, tokenizer
        self.name = Path(source.path).name if is_local(source.path) else source.path
        self.characters = 0
        self.documents = self._read()

    def _read(self) -> Generator[Document]:
        path = self.source.path
        field = TextField(self.source.text, f"{self.key}text or --text-field", self.source.missing == "skip", chats=True)
        try:
            for where, text in _read_local(path, field) if is_local(path) else _read_dataset(self.source, field, self.key):
                yield from self._documents(where, text)
        except GeneratorExit:  # the caller has read enough
            field.report(self.name, self.notify)
            raise
        field.check(path)
        field.report(self.name, self.notify)

    def _documents(self, where: str, text: str | list[dict[str, Any]]) -> Iterator[Document]:
        if not isinstance(text, str):
            document = rendered(text, self.tokenizer, where)
            yield Document(clean(document), document.prompts)
            return
        for start in range(0, len(text), MAX_DOCUMENT):
            piece = clean(text[start : start + MAX_DOCUMENT])
            if piece.strip():
                yield Document(piece)


def clean(text: str) -> str:
    """Return the text with lone surrogates replaced. JSON can contain them, and tokenizers don't accept them."""
    return text.encode("utf-8", "replace").decode("utf-8")


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn errors of reading a text file into an InputError that names the file. Out-of-memory errors are passed on."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"data: {file}: not UTF-8 ({error.reason}). Save it as UTF-8, or leave it out of the text.") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise InputError(f"data: {file}: can't be read ({first_line(error)}). Write or download it again.") from None


def _read_local(path: str, field: TextField) -> Iterator[tuple[str, Any]]:
    """Yield (where, text) of local files. A text may be a list of messages."""
    for file in local_files(path):
        with readable(file):
            if file.name.endswith(PLAIN):
                yield from ((str(file), text) for text in _paragraphs(file))
            else:
                rows = rows_of(file, {field.name: field.option})
                yield from ((where, text) for where, _, text in field.texts(rows, str(file)))


def _paragraphs(file: Path) -> Iterator[str]:
    """Yield the paragraphs of a .txt file, which blank lines separate. Those longer than MAX_DOCUMENT are yielded in pieces."""
    with opened(file) as lines:
        paragraph, size = [], 0
        for line in iter(partial(lines.readline, MAX_DOCUMENT), ""):
            if line.strip():
                paragraph.append(line)
                size += len(line)
            elif paragraph:
                yield "".join(paragraph).strip("\n")
                paragraph, size = [], 0
            if size > MAX_DOCUMENT:
                whole = "".join(paragraph)
                yield whole[:MAX_DOCUMENT]
                paragraph, size = [whole[MAX_DOCUMENT:]], size - MAX_DOCUMENT
        yield "".join(paragraph).strip("\n")


def opened(file: Path) -> TextIO:
    """Open a UTF-8 text file, which may be gzipped and may have a byte-order mark."""
    return gzip.open(file, "rt", encoding="utf-8-sig") if file.suffix == ".gz" else file.open(encoding="utf-8-sig")


def rows_of(file: Path, fields: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield (location, content) for every row of a .jsonl or .parquet file. Raises InputError.

    fields: names of the fields, each with the option that sets it, for errors. Of a .parquet file only these fields are read, and
    all are required.
    """
    return _parquet_rows(file, fields) if file.suffix == ".parquet" else _json_rows(file)


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with opened(file) as lines:
        for number, line in enumerate(iter(partial(lines.readline, MAX_LINE), ""), 1):
            where = f"{file}, line {number}"
            if len(line) == MAX_LINE and not line.endswith("\n"):
                raise InputError(f"data: {where}: more than {MAX_LINE:,} characters. Write one document per line.")
            if line.strip():
                try:
                    row = json.loads(line)
                except RecursionError:
                    raise InputError(f"data: {where}: nested too deeply to be read. Write one document per line.") from None
                except json.JSONDecodeError as error:
                    raise InputError(f"data: {where}: not valid JSON ({error.msg}). Write one document per line.") from None
                except ValueError:  # Python's limit of 4,300 digits
                    raise InputError(f"data: {where}: a number has too many digits. Write it as text.") from None
                yield where, row


def _parquet_rows(file: Path, fields: dict[str, str]) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        for field, option in fields.items():
            if field not in names:
                raise missing(field, str(file), names, option)
        batches = table.iter_batches(batch_size=_BATCH_ROWS, columns=list(fields))
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{file}, row {number}", row
    except MemoryError:  # pyarrow's subclass is also an ArrowException
        raise
    except pyarrow.ArrowException as error:
        raise InputError(
            f"data: {file}: not a readable parquet file ({first_line(error)}). Write or download it again."
        ) from None


def _read_dataset(source: Source, field: TextField, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, text) of a Hub dataset. It is streamed, so only the rows that are read are downloaded."""
    import datasets

    split = source.split or "train"
    config = "" if source.config is None else f"config {source.config}, "
    name = f"{source.path} ({config}split {split})"
    try:
        rows: Iterable[Any] = datasets.load_dataset(source.path, name=source.config, split=split, streaming=True)
        numbered = ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))
        yield from ((where, text) for where, _, text in field.texts(numbered, name))
    except InputError:
        raise
    except Exception as error:  # datasets, fsspec and the HTTP client each have their own types; the message has the cause
        if is_out_of_memory(error) or is_disk_full(error):
            raise
        if isinstance(error, ValueError):
            _check_config(source, f"{key}config")
        reason = without_secrets(first_line(error))
        raise InputError(f"data: {name}: neither a local path nor a dataset that can be read from the Hub: {reason}") from None


def _check_config(source: Source, key: str) -> None:
    """Raise InputError if a dataset needs a configuration and the recipe names none, or if it lacks the one that is named."""
    import datasets

    names, default = [], None
    with suppress(Exception):  # the caller then reports the original error
        names = datasets.get_dataset_config_names(source.path)
        default = datasets.get_dataset_default_config_name(source.path)
    if source.config is not None and names and source.config not in names:
        raise InputError(f"{key}: {source.path} has no configuration {source.config!r}. Set {key} to one of {listed(names, 40)}.")
    if source.config is None and default is None and len(names) > 1:
        raise InputError(f"data: {source.path} has several configurations. Set {key} to one of {listed(names, 40)}.")


def without_secrets(line: str) -> str:
    """Return an HTTP client's error message without access tokens, passwords and query strings of URLs."""
    with suppress(Exception):
        import huggingface_hub

        token = huggingface_hub.get_token()
        line = line.replace(token, "...") if token else line
    return _SECRET.sub("...", line)
