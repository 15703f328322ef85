"""Labelled documents: texts with a class each, of which a sample a class is kept, chosen by content."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mxd_convert.data.documents import PLAIN, clean, local_files, readable, rows_of
from mxd_convert.data.fields import TextField, label_of
from mxd_convert.errors import InputError

MOST_CLASSES = 100
FEWEST_DOCUMENTS = 10  # a class: below, neither the folds nor the test part have enough of it


@dataclass(frozen=True)
class Labelled:
    """A sample of labelled documents, `texts` and `labels` of the same length.

    available: documents a class in the data. empty, ambiguous: documents left out because they held nothing but white space or null, or
    because the same text stood in the sample under several labels.
    """

    texts: list[str]
    labels: list[str]
    available: dict[str, int]
    empty: int
    ambiguous: int

    def fingerprint(self) -> str:
        """SHA-256 over the sample's texts and labels, each after its length in bytes."""
        digest = hashlib.sha256()
        for part in (part.encode() for pair in zip(self.texts, self.labels, strict=True) for part in pair):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


def read_labelled(path: str, text_field: str, label_field: str, most: int, seed: int) -> Labelled:
    """At most `most` documents a class from .jsonl (also .gz) or .parquet files. Raises InputError.

    Which ones follows from the seed and their content, not from their order in the file; of equal texts one is kept.
    """
    kept: dict[str, list[tuple[int, str]]] = {}  # heaps, the largest key first out
    available: Counter[str] = Counter()
    empty = 0
    for text, label in _rows(path, text_field, label_field):
        if not text.strip():
            empty += 1
            continue
        available[label] += 1
        heap = kept.setdefault(label, [])
        if len(kept) > MOST_CLASSES:
            raise InputError(
                f"--label-field {label_field}: more than {MOST_CLASSES} different labels in {Path(path).name};"
                " name the field that holds the class"
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
    """Raises InputError where there are not at least two classes with documents enough to train and to test on."""
    counts = Counter(labels)
    if not counts:
        raise InputError(f"--data {source}: no document with text in it")
    if len(counts) == 1:
        raise InputError(
            f"--label-field {label_field}: all documents of {source} are of one class, {shown(labels[0])};"
            " a probe needs at least two"
        )
    label, count = min(counts.items(), key=lambda item: (item[1], item[0]))
    if count < FEWEST_DOCUMENTS:
        raise InputError(
            f"--data {source}: class {shown(label)} has {count} document{'s' if count != 1 else ''} with text, and a probe needs"
            f" {FEWEST_DOCUMENTS}; add some, or take the class out of the data"
        )


def shown(label: str) -> str:
    """A label from the data, for a line of text."""
    return repr(label if len(label) <= 60 else label[:57] + "...")


def _rows(path: str, text_field: str, label_field: str) -> Iterator[tuple[str, str]]:
    """Yield (text, label) of all rows; the text is empty, and the label unread, in a row without text."""
    field = TextField(text_field, "--text-field")
    for file in local_files(path):
        if file.name.endswith(PLAIN):
            raise InputError(
                f"data: {file}: a .txt file has no labels; give .jsonl (also .gz) or .parquet with a text and a label"
            )
        with readable(file):
            rows = rows_of(file, {text_field: field.option, label_field: "--label-field"})
            for where, row, text in field.texts(rows, str(file)):
                yield clean(text), clean(label_of(row, label_field, where)) if text.strip() else ""
    field.check(path)
    yield from [("", "")] * field.without
