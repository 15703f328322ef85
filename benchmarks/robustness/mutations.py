"""Changes to JSON, YAML and plain bytes that a careless or hostile hand could make."""

import copy
import json
import math
import random
import re
from collections.abc import Callable
from typing import Any

DEEP = "@@deep@@"  # stands for nesting that the encoder itself could not write
NESTED = 50_000  # levels
ESCAPE = "\x1b[31mred\x1b[0m"

HOSTILE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3.5,
        1e308,
        -1e308,
        math.nan,
        math.inf,
        -math.inf,
        10**5,
        10**7,
        10**9,
        2**31,
        2**63,
        10**20,
    ),
    *(
        "",
        " ",
        "x",
        "0",
        "-1",
        "true",
        "null",
        "nan",
        ESCAPE,
        "a\nb",
        "\r\n\t",
        "\0",
        "\ud800",
        "\u202e",
        "[/x]",
        "[bold]",
        "`x`",
        "|",
    ),
    *("{i}", "{i:>99}", "{i:>2000000000}", "{0}", "{i.__class__}", "{", "%s", "%n", "${HOME}", "${NOT_THERE}", "$(id)"),
    *("../x", "./", "/nowhere/x", "~", "x" * 300, "x" * 200_000, "-x", "--help", "=1+1", "<b>x</b>", "# x", "---"),
    *([], {}, [[]], [None], [0], ["x"], {"": None}, {"x": {}}, [[[[[[]]]]]], DEEP, [1] * 10_000, {"0": 0}),
)


class Twin(str):
    """A key that may be in a mapping twice."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def amount(draw: random.Random) -> int:
    """How many changes are made: mostly one."""
    return draw.choices((1, 2, 3, 6), (70, 18, 8, 4))[0]


def changed(content: Any, draw: random.Random) -> Any:
    """Return a copy of JSON-like content with changes of its structure or values."""
    content = copy.deepcopy(content)
    for _ in range(amount(draw)):
        content = _change(content, draw)
    return content


def _change(content: Any, draw: random.Random) -> Any:
    place = _place(content, draw)
    if place is None:
        return hostile(draw)
    holder, key = place
    draw.choices((_replace, _delete, _duplicate, _rename, _other_type, _swap, _nudge), (50, 12, 6, 8, 12, 5, 7))[0](
        holder, key, draw
    )
    return content


def _place(content: Any, draw: random.Random) -> tuple[Any, Any] | None:
    """A place in nested mappings and lists, not too deep: (holder, key)."""
    found = None
    while isinstance(content, dict | list) and content:
        key = draw.choice(list(content)) if isinstance(content, dict) else draw.randrange(len(content))
        value = next(v for k, v in content.items() if k is key) if isinstance(content, dict) else content[key]
        found, content = (content, key), value
        if draw.random() < 0.25:
            break
    return None if found is None or draw.random() < 0.02 else found


def hostile(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(HOSTILE))


def _replace(holder: Any, key: Any, draw: random.Random) -> None:
    holder[key] = hostile(draw)


def _delete(holder: Any, key: Any, draw: random.Random) -> None:
    del holder[key]


def _duplicate(holder: Any, key: Any, draw: random.Random) -> None:
    if isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[Twin(key)] = hostile(draw)


def _rename(holder: Any, key: Any, draw: random.Random) -> None:
    if isinstance(holder, list):
        holder.reverse()
        return
    names = (
        str(key).upper(),
        str(key).capitalize(),
        f"{key} ",
        f"{key}s",
        str(key)[:-1],
        str(key).replace("_", "-"),
        "",
        "-1",
        "99",
        ESCAPE,
    )
    holder[draw.choice((*names, "x" * 5000, "__class__", "*", "0.5"))] = holder.pop(key)


def _other_type(holder: Any, key: Any, draw: random.Random) -> None:
    value = holder[key]
    ways: tuple[Callable[[], Any], ...] = (
        lambda: str(value),
        lambda: [value],
        lambda: {"x": value},
        lambda: bool(value),
        lambda: [value] * 3,
    )
    holder[key] = draw.choice(ways)()


def _swap(holder: Any, key: Any, draw: random.Random) -> None:
    other = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    holder[key], holder[other] = holder[other], holder[key]


def _nudge(holder: Any, key: Any, draw: random.Random) -> None:
    value = holder[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = draw.choice((-value, value + 1, value - 1, value * 1000, value / 3, float(value)))
    elif isinstance(value, str):
        at = draw.randint(0, len(value))
        holder[key] = draw.choice((value[:at], value[at:], value + value, value[:at] + draw.choice("\n\0é\"'\\/ ") + value[at:]))
    else:
        holder[key] = hostile(draw)


def to_json(content: Any) -> bytes:
    """Return it as JSON, with NaN and infinity as Python's decoder reads them."""
    text = json.dumps(content, ensure_ascii=True, indent=2)
    return text.replace(f'"{DEEP}"', "[" * NESTED + "]" * NESTED).encode()


def json_file(content: bytes, draw: random.Random) -> bytes:
    """Return a JSON file, changed in its structure or in its bytes."""
    if draw.random() < 0.75:
        return to_json(changed(json.loads(content), draw))
    return raw(content, draw)


# --- bytes ------------------------------------------------------------------------------------------------------------------------

WHOLE = (
    *(b"", b"\n", b"null", b"[]", b"{}", b"{", b"0", b'"x"', b"\xff\xfe", b"\0" * 100, b"NaN", b"[" * NESTED, b'{"a":' * NESTED),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
    b"<!doctype html><title>404</title>\n",
)


def raw(content: bytes, draw: random.Random) -> bytes:
    """Return bytes with some of them changed."""
    if draw.random() < 0.08:
        return draw.choice(WHOLE)
    for _ in range(amount(draw)):
        content = draw.choice((_flip, _cut, _insert, _remove, _repeat, _digits, _mark))(content, draw)
    return content


def _flip(content: bytes, draw: random.Random) -> bytes:
    if not content:
        return content
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randint(0, len(content))]


def _insert(content: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(content))
    pieces = (
        draw.randbytes(draw.randint(1, 8)),
        b"\xc3\x28",
        b"\xed\xa0\x80",
        b"\0",
        b"\x1b[2J",
        b'"',
        b"}",
        b"]",
        b",",
        b"\n",
        b"[" * 3000,
        b"\t",
    )
    return content[:at] + draw.choice(pieces) + content[at:]


def _remove(content: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(content))
    return content[:at] + content[at + draw.randint(1, 40) :]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(content))
    return content[: at + 40] + content[at:]


def _digits(content: bytes, draw: random.Random) -> bytes:
    """A number becomes another."""
    numbers = list(re.finditer(rb"\d+", content))
    if not numbers:
        return content
    found = draw.choice(numbers)
    other = draw.choice((b"9" * 5000, b"99999999999999999999", b"-1", b"0", b"1e999", b"007", b"1_0", b"0x10", b"100000000"))
    return content[: found.start()] + other + content[found.end() :]


def _mark(content: bytes, draw: random.Random) -> bytes:
    """Another encoding, or other line ends."""
    ways = (
        b"\xef\xbb\xbf" + content,
        b"\xff\xfe" + content,
        content.replace(b"\n", b"\r\n"),
        content.decode("latin-1").encode("utf-16"),
    )
    return draw.choice(ways)


# --- YAML -------------------------------------------------------------------------------------------------------------------------

YAML_VALUES = (
    *(
        "!!python/object/apply:os.system [id]",
        "!x 1",
        "!!binary x",
        "!!float x",
        "!!set {a}",
        "!!omap x",
        "0x10",
        "1_000",
        "1__0",
        "2026-01-01",
    ),
    *(
        ".nan",
        ".inf",
        "-.inf",
        "~",
        "yes",
        "1:30",
        "|",
        ">",
        "'",
        '"',
        "@x",
        "`x`",
        "*x",
        "&x",
        "&x [*x]",
        "%",
        "? x",
        "- x",
        "[",
        "{",
        "{a: b}",
    ),
    *(
        "${HOME}",
        "${NOT_THERE}",
        "${",
        "$HOME",
        "1e999",
        "-0",
        "0.0",
        "9" * 5000,
        "0b1",
        "<<",
        "a: b",
        "\x1b[31m",
        "\u2028",
        "\ufeff",
        "[" * 3000,
    ),
)
YAML_LINES = (
    "a: &a {k: 1}",
    "b: *a",
    "<<: {layers: all}",
    "? [a]\n: b",
    "---",
    "...",
    "\t",
    "%YAML 9.9",
    "- x",
    "# x",
    "Layers: all",
    "x",
    ": x",
    "layers: 0\nlayers: 1",
)


def yaml_file(text: str, draw: random.Random) -> bytes:
    """Return a YAML file with changes that only YAML has."""
    lines = text.splitlines()
    for _ in range(amount(draw)):
        at = draw.randrange(len(lines)) if lines else 0
        if draw.random() < 0.6 and lines and ":" in lines[at]:
            lines[at] = f"{lines[at].split(':')[0]}: {draw.choice(YAML_VALUES)}"
        else:
            lines.insert(at, draw.choice(("", "  ")) + draw.choice(YAML_LINES))
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def bomb() -> bytes:
    """Return a kilobyte of YAML that its aliases make a billion entries of."""
    lines = ["a: &a {k: 1}"]
    for number in range(9):
        lines.append(f"{chr(98 + number)}: &{chr(98 + number)} {{{', '.join(f'x{j}: *{chr(97 + number)}' for j in range(10))}}}")
    return ("\n".join(lines) + "\n").encode()
