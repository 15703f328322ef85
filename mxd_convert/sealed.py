"""JSON files that hold their own checksum, so that a resumed run knows whether what it reads is what was written."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mxd_convert.errors import InputError
from mxd_convert.files import finite, read_mapping, write_json

_SEAL = "seal"


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file with the checksum of its content."""
    content = json.loads(json.dumps(finite(content)))  # as it will be read
    write_json(path, {**content, _SEAL: _checksum(content)})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return the content of such a file; None where it is missing, damaged or of another kind."""
    try:
        content = read_mapping(path)
    except InputError:
        return None
    seal = content.pop(_SEAL, None)
    return content if seal == _checksum(content) else None


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
