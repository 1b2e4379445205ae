"""Mutations that know the format that they change.

There are some for trees of plain data (JSON, YAML), safetensors files, YAML text and bytes of any
kind. All of them draw from one `random.Random`.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

NAMES = [
    "../../up",
    "/etc/passwd",
    "C:\\up",
    "a/b",
    "\x1b[2J\x1b]0;title\x07",
    "line\nbreak",
    "\u202eright to left",
    "nul\x00",
    "",
    ".",
    "..",
    "x" * 5000,
    "model.layers.0.a.weight",
    "<script>alert(1)</script>",
    "{0}{1}%s%n",
    "\ud800",
    "~",
    "__class__",
    "-rf",
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    4,
    7,
    16,
    2**31,
    2**63,
    2**64,
    10**30,
    10**400,
    -(10**18),
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e30,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    "1",
    "f32",
    "u4",
    "test",
    "done",
    [],
    [[]],
    {},
    {"a": 1},
    [None],
    [1, 2, 3],
    ["x"],
    [{"name": "a"}],
    {"": {}},
    *NAMES,
]
DTYPES = [
    "F32",
    "F16",
    "BF16",
    "F64",
    "U8",
    "I8",
    "I16",
    "I32",
    "I64",
    "U16",
    "U32",
    "U64",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "C64",
    "F33",
    "",
    "f32",
]
SIZES = [
    0,
    1,
    2,
    3,
    7,
    8,
    16,
    127,
    128,
    129,
    255,
    4096,
    2**20,
    2**31 - 1,
    2**32,
    10**12,
    2**62,
    2**63,
    2**64 - 1,
    2**64,
    -1,
    1.5,
    "8",
    None,
]
SUFFIXES = [
    "",
    ".codes",
    ".scale",
    ".row",
    ".col",
    ".anchor_A",
    ".anchor_B",
    ".gradient_L",
    ".gradient_R",
    ".in_cov",
    ".out_cov",
    ".in_cov.vectors",
    ".in_cov.values",
    ".in_cov.floor",
    ".out_cov.vectors",
    ".out_cov.values",
    ".out_cov.floor",
    ".other",
]
# The bytes of f32 numbers that a reader may trip over.
NUMBERS = [
    b"\x00\x00\xc0\x7f",  # NaN
    b"\x00\x00\x80\x7f",  # inf
    b"\x00\x00\x80\xff",  # -inf
    b"\x00\x00\x80\xbf",  # -1
    b"\x01\x00\x00\x00",  # the least
    b"\xff\xff\x7f\x7f",  # the most
    b"\xff\xff\x7f\xff",  # minus the most
    b"\xca\xf2\x49\x71",  # 1e30
    b"\x60\x42\xa2\x0d",  # 1e-30
    b"\x00\x00\x00\x00",  # 0
]


def tree(data: Any, rng: random.Random, times: int | None = None) -> Any:
    """Plain data with some of its values, keys and places changed."""
    data = copy.deepcopy(data)
    for _ in range(times or rng.choice((1, 1, 1, 2, 4))):
        holder: Any = [data]
        key: Any = 0
        for _ in range(rng.randint(0, 7)):  # a random walk down
            inner = holder[key]
            if not isinstance(inner, (dict, list)) or not inner:
                break
            holder, key = (
                inner,
                rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner)),
            )
        root = isinstance(holder, list) and len(holder) == 1 and holder[0] is data
        how = rng.choice(("value", "value", "value", "delete", "rename", "copy", "nest", "type"))
        if how == "value":
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif how == "delete" and not root:
            del holder[key]
        elif how == "rename" and isinstance(holder, dict):
            holder[rng.choice(NAMES)] = holder.pop(key)
        elif how == "copy" and not root:
            holder[key] = copy.deepcopy(
                rng.choice(list(holder.values()) if isinstance(holder, dict) else holder)
            )
        elif how == "nest":
            for _ in range(rng.choice((1, 2, 60, 300))):
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
        elif how == "type":
            value = holder[key]
            holder[key] = (
                list(value)
                if isinstance(value, dict)
                else str(value)
                if not isinstance(value, str)
                else [value]
            )
        data = holder[0] if root else data
    return data


def as_json(data: Any, rng: random.Random) -> bytes:
    """JSON, now and then with what its grammar does not know or what breaks parsers."""
    try:
        text = json.dumps(data)
    except RecursionError:
        text = "[" * 500
    if rng.random() < 0.05:
        text = rng.choice(
            (
                text + text,
                "[" * 100_000,
                '{"a":' * 5000,
                text.replace(":", ": 1" + "0" * 5000 + ",", 1),
                text[:-1],
                "\ufeff" + text,
                text.replace('"', '"\\ud800', 1),
                text.replace('"', "'"),
            )
        )
    return (
        text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.98
        else text.encode("utf-16", "surrogatepass")
    )


def raw(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, put in, repeated."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        how = rng.randrange(6)
        if how == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del out[at:]
        elif how == 2:
            del out[at : at + rng.choice((1, 4, 64))]
        elif how == 3:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif how == 4:
            out[at:at] = out[at : at + rng.choice((1, 8, 256))]
        elif at < len(out):
            out[at] = rng.choice((0, 1, 0x1B, 0x22, 0x5B, 0x7B, 0x7F, 0x80, 0xC0, 0xFF))
    return bytes(out)


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with changes in its header, its metadata, its numbers or its bytes."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
        assert isinstance(header, dict)
    except (ValueError, RecursionError, AssertionError, struct.error):  # a mutant that grows on
        return raw(data, rng)
    claimed = None
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        how = rng.choice(
            (
                "metadata",
                "metadata",
                "field",
                "field",
                "name",
                "numbers",
                "numbers",
                "numbers",
                "raw",
                "length",
                "header",
                "reshape",
            )
        )
        names = [
            name for name in header if name != "__metadata__" and isinstance(header[name], dict)
        ]
        if (
            how == "metadata"
            and isinstance(header.get("__metadata__"), dict)
            and "forgetless" in header["__metadata__"]
        ):
            info = header["__metadata__"]["forgetless"]
            try:
                header["__metadata__"]["forgetless"] = as_json(
                    tree(json.loads(info), rng), rng
                ).decode("utf-8", "replace")
            except (ValueError, TypeError, RecursionError):
                header["__metadata__"] = tree(header["__metadata__"], rng)
        elif how == "field" and names:
            _field(header[rng.choice(names)], rng)
        elif how == "name" and names:
            name = rng.choice(names)
            base = name.removesuffix(
                next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), "")
            )
            header[rng.choice((rng.choice(NAMES), base + rng.choice(SUFFIXES), base))] = (
                header[name] if rng.random() < 0.1 else header.pop(name)
            )
        elif how == "numbers" and len(body) >= 4:
            number = rng.choice(NUMBERS)
            for _ in range(rng.choice((1, 1, len(body)))):
                at = rng.randrange(0, len(body) - 3)
                body[at - at % 4 : at - at % 4 + 4] = number
        elif how == "reshape" and names:
            shape = header[rng.choice(names)].get("shape")
            if isinstance(shape, list):
                rng.shuffle(shape)
                shape.insert(rng.choice((0, len(shape))), 1)
        elif how == "header":
            header = tree(header, rng, 1)
            header = header if isinstance(header, dict) else {"a": header}
        elif how == "length":
            claimed = rng.choice((0, 1, length - 1, length + 1, 2**31, 10**12, 2**63, 2**64 - 1))
        else:
            body = bytearray(raw(bytes(body), rng)) if rng.random() < 0.5 else body
    try:
        text = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except RecursionError:
        text = b"{" * 1000
    out = struct.pack("<Q", len(text) if claimed is None else claimed) + text + bytes(body)
    return raw(out, rng) if rng.random() < 0.1 else out


def _field(field: dict[str, Any], rng: random.Random) -> None:
    how = rng.choice(("dtype", "shape", "size", "offsets"))
    if how == "dtype":
        field["dtype"] = rng.choice(DTYPES)
    elif how == "shape":
        field["shape"] = [rng.choice(SIZES) for _ in range(rng.choice((0, 1, 2, 2, 3, 40)))]
    elif how == "size" and isinstance(field.get("shape"), list) and field["shape"]:
        field["shape"][rng.randrange(len(field["shape"]))] = rng.choice(SIZES)
    else:
        field["data_offsets"] = (
            [rng.choice(SIZES), rng.choice(SIZES)] if rng.random() < 0.7 else [0, 10**12]
        )


EVIL_YAML = [
    "!!python/object/apply:os.system ['echo ran']",
    "!!python/name:os.system",
    "!!python/object/new:type [x]",
    "!!timestamp x",
    "!!bool x",
    "!!int x",
    "!!binary x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!<tag:yaml.org,2002:python/none> x",
    "&a [*a]",
    "*missing",
    "0x_",
    "0b_",
    "2026-99-99",
    "1:99:99",
    ".inf",
    ".nan",
    "-.INF",
    "9" * 5000,
    "0x" + "f" * 20000,
    "1_000",
    "1e999",
    "[" * 2000,
    "{a: " * 500,
    "? [a]\n: b",
    '"\\e[2J"',
    '"\\ud800"',
    '"\\u202e"',
    "\x1b[2J",
    "~",
    "yes",
    "1e-3",
    "{<<: {a: 1}}",
    "{<<: [1, 2]}",
    "[a, b",
    "'",
    "@",
    "`",
    "%TAG ! x",
    "--- a\n--- b",
    "|\n  text",
    ">-\n",
    "\t",
    "\u2028",
    "=",
    "<<",
    "-",
    "a: b: c",
]


def bomb(rng: random.Random) -> str:
    """Aliases of aliases, as lists or by merge keys: billions of values in a few hundred bytes."""
    levels, width = rng.choice((3, 9, 25)), rng.choice((2, 9))
    if rng.random() < 0.5:
        lines = ["a0: &a0 [x, x]"] + [
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)
        ]
    else:
        lines = ["a0: &a0 {k: v}"] + [
            f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * width)}]}}" for i in range(1, levels)
        ]
    return "\n".join(lines)


def yaml_text(text: str, rng: random.Random) -> bytes:
    """YAML with values, keys, lines and indentation changed."""
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        how = rng.randrange(8)
        key, colon, _ = lines[at].partition(":")
        if how in (0, 1, 2) and colon:
            evil = rng.random() < 0.6
            value = rng.choice(EVIL_YAML if evil else NAMES + [json.dumps(v) for v in VALUES[:20]])
            lines[at] = f"{key}: {value}"
        elif how == 3 and colon:
            lines[at] = lines[at].replace(
                key.strip(), rng.choice((*NAMES, *EVIL_YAML, "1", "null")), 1
            )
        elif how == 4:
            lines[at] = " " * rng.randint(0, 9) + lines[at].lstrip()
        elif how == 5:
            del lines[at]
        elif how == 6:
            lines.insert(at, rng.choice(lines))
        else:
            lines.insert(
                at,
                rng.choice(
                    (
                        bomb(rng),
                        f"extra: {rng.choice(EVIL_YAML)}",
                        "base: base.yaml",
                        "base: ../../etc/passwd",
                        "base: case.yaml",
                    )
                ),
            )
        lines = lines or [""]
    out = "\n".join(lines).encode("utf-8", "surrogatepass")
    return raw(out, rng) if rng.random() < 0.1 else out
