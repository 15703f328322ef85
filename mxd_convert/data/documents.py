"""Documents from local files, datasets and the Hub, one after the other; and which of them are held out."""

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mxd_convert.errors import InputError
from mxd_convert.recipe import EvalText, Text, is_local

HELD_OUT_SHARE = 0.1
SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")


def is_held_out(text: str) -> bool:
    """Whether a document belongs to the tenth that is held out where no evaluation text is given.

    Decided by the document's content alone: the same in every run, in any order of files, and equal documents stay together.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < HELD_OUT_SHARE * 2**64


def local_files(path: str) -> list[Path]:
    """The text files that a local path, folder or glob names, sorted. Raises InputError where there are none."""
    if any(sign in path for sign in "*?[") and not Path(path).exists():
        files = sorted(
            Path(found) for found in glob.glob(path, recursive=True) if found.endswith(SUFFIXES) and Path(found).is_file()
        )
        if not files:
            raise InputError(f"data: {path}: no {', '.join(SUFFIXES)} file matches this glob")
    elif Path(path).is_dir():
        files = sorted(found for found in Path(path).rglob("*") if found.is_file() and found.name.endswith(SUFFIXES))
        if not files:
            raise InputError(f"data: {path}: the folder holds no {', '.join(SUFFIXES)} file")
    elif Path(path).is_file():
        files = [Path(path)]
    else:
        raise InputError(f"data: {path}: no such file or folder")
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise InputError(f"data: {file}: unknown kind of text file; known: {', '.join(SUFFIXES)}")
    return files


def read_documents(source: Text | EvalText) -> Iterator[str]:
    """The documents of a text source in order, empty ones left out. Raises InputError."""
    assert source.path is not None
    if is_local(source.path):
        for file in local_files(source.path):
            with readable(file):
                yield from filter(str.strip, map(clean, _read_file(file, source.text)))
    else:
        yield from filter(str.strip, map(clean, _read_dataset(source)))


def clean(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON may hold and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turns the ways in which a text file can't be read into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise InputError(f"data: {file}: can't be read ({error})") from None


def _read_file(file: Path, field: str) -> Iterator[str]:
    if file.suffix == ".parquet":
        yield from (row[field] for row in parquet_rows(file, [field]) if isinstance(row[field], str))
    elif ".jsonl" in file.suffixes:
        yield from (text_of(row, field, where) for where, row in json_rows(file))
    else:
        with opened(file) as lines:
            paragraph: list[str] = []
            for line in lines:
                if line.strip():
                    paragraph.append(line)
                elif paragraph:
                    yield "".join(paragraph).strip("\n")
                    paragraph = []
            yield "".join(paragraph).strip("\n")


def opened(file: Path) -> TextIO:
    """A text file, gzipped or not, with or without a byte-order mark."""
    return gzip.open(file, "rt", encoding="utf-8-sig") if file.suffix == ".gz" else file.open(encoding="utf-8-sig")


def json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, what it holds) of every line of a .jsonl file. Raises InputError."""
    with opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}, line {number}"
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"data: {where}: not valid JSON ({error.msg})") from None


def text_of(row: Any, field: str, where: str) -> str:
    """The text of a row. Raises InputError where the field holds none."""
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        known = f"; its fields are {', '.join(row)}" if isinstance(row, dict) else ""
        raise InputError(
            f"data: {where}: no text in the field {field!r}{known}. Name the field with data.train.text or --text-field"
        )
    return str(row[field])


def parquet_rows(file: Path, fields: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, of some of its columns. Raises InputError."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        for field in fields:
            if field not in table.schema_arrow.names:
                raise InputError(f"data: {file}: no column {field!r}; its columns are {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(columns=fields):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"data: {file}: not a readable parquet file ({error})") from None


def _read_dataset(source: Text | EvalText) -> Iterator[str]:
    """Streams a dataset from the Hub: nothing is downloaded but what is read."""
    import datasets

    name = f"data: {source.path} (split {source.split})"
    try:
        rows = iter(datasets.load_dataset(source.path, split=source.split or "train", streaming=True))
        for row in rows:
            if not isinstance(row.get(source.text), str):
                raise InputError(f"{name}: no text in the field {source.text!r}; its fields are {', '.join(row)}")
            yield row[source.text]
    except InputError:
        raise
    except Exception as error:  # datasets, fsspec and the HTTP client each have their own; the cause is in the words
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{name}: neither a local path nor a dataset that can be read from the Hub: {reason}") from None
