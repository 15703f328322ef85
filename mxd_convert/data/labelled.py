"""Labelled documents: texts with a class, sampled per class by their content."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mxd_convert.data.documents import PLAIN, clean, local_files, readable, rows_of
from mxd_convert.data.fields import TextField, label_of
from mxd_convert.errors import InputError

MAX_CLASSES = 100  # different labels in a data set
MIN_DOCUMENTS = 10  # documents per class: with fewer, the folds and the test split have too few of the class


@dataclass(frozen=True)
class Labelled:
    """A sample of labelled documents.

    Attributes:
        texts: texts of the documents.
        labels: classes of the documents, in the same order.
        available: number of documents per class in the data.
        empty: number of documents left out because their text is null or only white space.
        ambiguous: number of documents left out because the sample had the same text with several labels.
    """

    texts: list[str]
    labels: list[str]
    available: dict[str, int]
    empty: int
    ambiguous: int

    def fingerprint(self) -> str:
        """Return the SHA-256 of the sample's texts and labels, each preceded by its length in bytes."""
        digest = hashlib.sha256()
        for item in (item.encode() for pair in zip(self.texts, self.labels, strict=True) for item in pair):
            digest.update(len(item).to_bytes(8, "little") + item)
        return digest.hexdigest()


def read_labelled(path: str, text_field: str, label_field: str, most: int, seed: int) -> Labelled:
    """Return a sample of at most `most` documents per class from .jsonl (also .gz) or .parquet files.

    The sample depends on the seed and the documents' content, not on their order. Of equal texts in a class, one is kept.

    Args:
        path: local file, folder or glob.
        text_field: name of the field with the text.
        label_field: name of the field with the class.
        most: largest number of documents per class.
        seed: seed of the sample.

    Raises:
        InputError: if the data can't be read, a label is invalid, or there are more than MAX_CLASSES classes.
    """
    kept: dict[str, list[tuple[int, str]]] = {}  # a heap per class, which removes the largest key first
    available: Counter[str] = Counter()
    empty = 0
    for text, label in _rows(path, text_field, label_field):
        if not text.strip():
            empty += 1
            continue
        available[label] += 1
        heap = kept.setdefault(label, [])
        if len(kept) > MAX_CLASSES:
            raise InputError(
                f"--label-field {label_field}: more than {MAX_CLASSES} different labels in {Path(path).name}."
                " Name the field that contains the class."
            )
        item = (-int.from_bytes(hashlib.sha256(f"{seed}\n{text}".encode()).digest()[:8], "big"), text)
        if (len(heap) < most or item > heap[0]) and item not in heap:
            (heapq.heappush if len(heap) < most else heapq.heapreplace)(heap, item)
    labels_of = Counter(text for heap in kept.values() for _, text in heap)
    chosen = sorted((-key, text, label) for label, heap in kept.items() for key, text in heap if labels_of[text] == 1)
    ambiguous = sum(count for count in labels_of.values() if count > 1)
    texts, labels = [text for _, text, _ in chosen], [label for *_, label in chosen]
    return Labelled(texts, labels, dict(sorted(available.items())), empty, ambiguous)


def check_classes(labels: list[str], source: str, label_field: str) -> None:
    """Raise InputError unless there are at least two classes, each with enough documents to train and to test on."""
    counts = Counter(labels)
    if not counts:
        raise InputError(f"--data {source}: no document with text in it. Use other data.")
    if len(counts) == 1:
        raise InputError(
            f"--label-field {label_field}: all documents of {source} are of one class, {shown(labels[0])}."
            " A probe needs at least two classes. Add documents or name another field."
        )
    label, count = min(counts.items(), key=lambda item: (item[1], item[0]))
    if count < MIN_DOCUMENTS:
        raise InputError(
            f"--data {source}: class {shown(label)} has {count} document{'s' if count != 1 else ''} with text, and a probe needs"
            f" {MIN_DOCUMENTS}. Add documents, or remove the class from the data."
        )


def shown(label: str) -> str:
    """Return a label from the data in quotes, cut to 60 characters and escaped for one line of text."""
    return repr(label if len(label) <= 60 else label[:57] + "...")


def _rows(path: str, text_field: str, label_field: str) -> Iterator[tuple[str, str]]:
    """Yield (text, label) for all rows. For a row without text, both are empty."""
    field = TextField(text_field, "--text-field")
    for file in local_files(path):
        if file.name.endswith(PLAIN):
            raise InputError(
                f"data: {file}: a .txt file has no labels. Use .jsonl (also .gz) or .parquet files with a text and a label."
            )
        with readable(file):
            rows = rows_of(file, {text_field: field.option, label_field: "--label-field"})
            for where, row, text in field.texts(rows, str(file)):
                yield clean(text), clean(label_of(row, label_field, where)) if text.strip() else ""
    field.check(path)
    yield from [("", "")] * field.without
