"""Mutations that keep the structure: values of JSON documents are exchanged, and lines of several documents.

libFuzzer itself only changes bytes, which seldom moves a whole document into another one that remains JSON.
"""

import json
from random import Random
from typing import Any

ODD = (
    None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, float("inf"), float("nan"), 127, 128, 255, 256, 65535, 65536,
    2**31 - 1, 2**31, 2**32, 2**46, 2**46 + 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63), "", " ",
    "0", "-1", "\0", "\n", "\x1b[2J", "\ud800", "\u2028", "é", "..", "/", "../x", "a/b", "a" * 300, "\x7f", "*", "[",
    [], {}, [[]], [{}], {"": 0}, [0, 0], [1, 2], [None], {"a": {"b": []}},
)  # fmt: skip
"""Values that often break parsers."""


def mutate(data: bytes, random: Random, most_bytes: int) -> bytes | None:
    """Return the input with a few changes; None if it has no JSON, or the result would be too long."""
    lines = data.split(b"\n")
    if len(lines) > 1 and random.random() < 0.3:
        return _fit(b"\n".join(_shuffle(lines, random)), most_bytes)
    at = random.randrange(len(lines))
    try:
        document = json.loads(lines[at])
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            document = change(document, random)
        lines[at] = json.dumps(document, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return None
    return _fit(b"\n".join(lines), most_bytes)


def change(document: Any, random: Random) -> Any:
    """Return a JSON document with one change; the argument may be modified."""
    places: list[tuple[Any, Any]] = []
    _collect(document, places)
    if not places or random.random() < 0.02:
        return _odd(random)
    container, key = random.choice(places)
    value = container[key]
    match random.randrange(8):
        case 0 | 1:
            container[key] = _odd(random)
        case 2:
            del container[key]
        case 3:
            container[key] = _copy(random.choice(places), random)
        case 4 if isinstance(value, int | float) and not isinstance(value, bool):
            container[key] = value + random.choice((-1, 1)) if random.random() < 0.5 else value * 2
        case 5 if isinstance(value, str):
            container[key] = _text(value, random)
        case 6 if isinstance(container, list):
            container.insert(key, _copy((container, key), random))
        case 6:
            container[_name(random.choice(places)[1], random)] = value
        case _:
            container[key] = [value] if random.random() < 0.5 else {"a": value}
    return document


def _collect(value: Any, places: list[tuple[Any, Any]]) -> None:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        places.append((value, key))
        _collect(inner, places)


def _odd(random: Random) -> Any:
    return json.loads(json.dumps(random.choice(ODD)))  # a copy, which may be modified


def _copy(place: tuple[Any, Any], random: Random) -> Any:
    container, key = place
    value = container.get(key) if isinstance(container, dict) else container[key] if key < len(container) else None
    return json.loads(json.dumps(value)) if random.random() < 0.9 else _odd(random)


def _name(key: Any, random: Random) -> str:
    return key if isinstance(key, str) and random.random() < 0.8 else str(random.choice(ODD))[:300]


def _text(text: str, random: Random) -> str:
    at = random.randrange(len(text) + 1)
    match random.randrange(4):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + chr(random.choice((0, 10, 27, 47, 46, 91, 0x2028, 0xD800, 0x1F600))) + text[at:]
        case 2:
            return text[:at] + chr(random.randrange(32, 127)) + text[at + 1 :]
        case _:
            return text + text


def _shuffle(lines: list[bytes], random: Random) -> list[bytes]:
    at, other = random.randrange(len(lines)), random.randrange(len(lines))
    match random.randrange(3):
        case 0:
            return lines[:at] + lines[at + 1 :]
        case 1:
            return [*lines[:at], lines[other], *lines[at:]]
        case _:
            lines[at], lines[other] = lines[other], lines[at]
            return lines


def _fit(data: bytes, most_bytes: int) -> bytes | None:
    return data if 0 < len(data) <= most_bytes else None
