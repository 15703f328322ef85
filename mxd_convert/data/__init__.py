"""Text -> packed token blocks, with a fingerprint; local files, datasets, Hub."""

from mxd_convert.data.blocks import (
    Blocks,
    Separators,
    TextInfo,
    block_order,
    check_vocabulary,
    prepare,
    prepare_eval,
    separators,
    tokens_to_read,
)
from mxd_convert.data.documents import HELD_OUT_SHARE, is_held_out, local_files, read_documents
from mxd_convert.data.labelled import FEWEST_DOCUMENTS, Labelled, check_classes, read_labelled

__all__ = [
    "FEWEST_DOCUMENTS",
    "HELD_OUT_SHARE",
    "Blocks",
    "Labelled",
    "Separators",
    "TextInfo",
    "block_order",
    "check_classes",
    "check_vocabulary",
    "is_held_out",
    "local_files",
    "prepare",
    "prepare_eval",
    "read_documents",
    "read_labelled",
    "separators",
    "tokens_to_read",
]
