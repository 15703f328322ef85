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
)
from mxd_convert.data.documents import HELD_OUT_SHARE, is_held_out, local_files, read_documents

__all__ = [
    "HELD_OUT_SHARE",
    "Blocks",
    "Separators",
    "TextInfo",
    "block_order",
    "check_vocabulary",
    "is_held_out",
    "local_files",
    "prepare",
    "prepare_eval",
    "read_documents",
    "separators",
]
