"""Changes to safetensors files."""

import json
import math
import random
import struct
from typing import Any

from robustness import mutations


def safetensors_file(content: bytes, draw: random.Random) -> bytes:
    """Return a safetensors file whose header, tensors or length are changed."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    way = draw.random()
    if way < 0.35:
        _spoil(header, data, draw)
        return _packed(json.dumps(header).encode(), bytes(data))
    if way < 0.6:
        names = [name for name in header if name != "__metadata__"]
        _of_one_tensor(header, draw.choice(names), draw)
        return _packed(json.dumps(header).encode(), bytes(data))
    if way < 0.75:
        return _packed(mutations.to_json(mutations.changed(header, draw)), bytes(data))
    if way < 0.85:
        sizes = (0, 1, size - 1, size + 1, len(content), 10**8 + 1, 2**63 - 1, 2**64 - 1)
        return struct.pack("<Q", draw.choice(sizes)) + content[8:]
    if way < 0.9:
        return _packed(mutations.raw(content[8 : 8 + size], draw), bytes(data))
    return mutations.raw(content, draw)


def _packed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _spoil(header: dict[str, Any], data: bytearray, draw: random.Random) -> None:
    """Values of a tensor that are no numbers, or too large to be used."""
    name = draw.choice([name for name in header if name != "__metadata__" and header[name]["dtype"] == "F32"])
    start, end = header[name]["data_offsets"]
    value = struct.pack("<f", draw.choice((math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45)))
    count = (end - start) // 4
    chosen = range(count) if draw.random() < 0.5 else draw.sample(range(count), min(count, draw.choice((1, 10))))
    for number in chosen:
        data[start + 4 * number : start + 4 * number + 4] = value


def _of_one_tensor(header: dict[str, Any], name: str, draw: random.Random) -> None:
    entry = header[name]
    start, end = entry["data_offsets"]
    way = draw.randrange(9)
    if way == 0:
        entry["dtype"] = draw.choice(("F16", "BF16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "X"))
    elif way == 1:
        entry["dtype"] = draw.choice(("I32", "U32"))  # of the same size
    elif way == 2:
        entry["shape"] = draw.choice(
            (list(reversed(entry["shape"])), [1, *entry["shape"]], [(end - start) // 4], [], [0], [10**9, 10**9], [-1])
        )
    elif way == 3:
        entry["data_offsets"] = draw.choice(
            ([end, start], [0, end - start], [start, 2**60], [-4, 4], ["a", 1], [start], [1.5, 2.5])
        )
    elif way == 4:
        del header[name]
    elif way == 5:
        header[draw.choice((f"{name}.x", name.upper(), "", "lm_head.weight", f"module.{name}", mutations.ESCAPE))] = header.pop(
            name
        )
    elif way == 6:
        header[draw.choice(("extra", "transformer.h.99.mlp.experts", "lm_head.bias"))] = dict(entry)
    elif way == 7:
        others = [other for other in header if other not in (name, "__metadata__")]
        header[name], header[other] = header[other := draw.choice(others)], entry
    else:
        header["__metadata__"] = draw.choice(({"format": "tf"}, {"format": mutations.ESCAPE}, {}, {"format": 3}, [], None))
