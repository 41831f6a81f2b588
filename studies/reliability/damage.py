"""Damage to files: structural changes of JSON values, and changes of bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

DEEP = 100_000  # levels of nesting
LONG = 100_000  # characters
DESCEND = 0.75  # the probability of looking further inside a container
# strings that stand for JSON texts that no Python value has: levels of lists, numbers beyond all ranges
LITERALS = {
    "@deep@": "[" * DEEP + "]" * DEEP,
    "@deep object@": '{"a":' * DEEP + "1" + "}" * DEEP,
    "@infinite@": "1e999",
    "@digits@": "9" * 5000,
}
TWICE = "@twice@"  # the end of a key that is written without it, as a second entry of the same key
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, -(10**9), 2**24, 2**31, 2**63, 2**64, 10**30, 0.5, -0.5, 1e308,
    float("nan"), float("inf"), float("-inf"), "", " ", "0", "x", "true", "null", "x" * LONG, "\0", "a\0b", "a\nb",
    "../victim", "/victim", "..", ".", "a/b", "a\\b", "\ud800", "(a+)+$", "(" * 200, "first", "second", "smile",
    [], {}, [[]], [0], [1, 1], [-1], [""], [None], [0] * LONG, {"": ""}, {"a": {"b": [1]}}, *LITERALS,
)  # fmt: skip
JsonPath = tuple[Any, ...]


def damaged_json(random: Random, values: Any, root: JsonPath = (), spared: tuple[str, ...] = ()) -> bytes:
    """The text of JSON values with one to three changes below `root`, outside the `spared` keys of it."""
    values = copy.deepcopy(values)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        path = _any_path(random, values, root, spared)
        _change(random, values, path)
    return _text(values).encode("utf-8", errors="surrogatepass")


def damaged_text(random: Random, content: bytes) -> bytes:
    """Some bytes, changed without regard to what they mean."""
    return random.choice(TEXT_CHANGES)(random, content)


def flipped(random: Random, content: bytes, start: int = 0, end: int | None = None, most: int = 4) -> bytes:
    """Some bytes with up to `most` of those from `start` to `end` changed, each in one bit or in all."""
    changed = bytearray(content)
    for _ in range(random.randint(1, most)):
        position = random.randrange(start, len(content) if end is None else end)
        changed[position] ^= random.choice((1 << random.randrange(8), random.randrange(1, 256)))
    return bytes(changed)


def truncated(random: Random, content: bytes) -> bytes:
    """Some bytes without the last ones."""
    return content[: random.randrange(len(content))]


def _replaced(random: Random, content: bytes) -> bytes:
    return random.choice((b"", b"\0" * len(content), b"null", b"[]", b"{}", b"1", random.randbytes(len(content))))


def _inserted(random: Random, content: bytes) -> bytes:
    position = random.randrange(len(content) + 1)
    added = random.choice((b"\0", b"\xff\xfe", b",", b"{", b"]", b"NaN", b"\xef\xbb\xbf", random.randbytes(9)))
    return content[:position] + added + content[position:]


def _removed(random: Random, content: bytes) -> bytes:
    start = random.randrange(len(content))
    return content[:start] + content[start + random.randint(1, 40) :]


def _recoded(random: Random, content: bytes) -> bytes:
    return content.decode("utf-8", errors="replace").encode(random.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")))


TEXT_CHANGES: tuple[Callable[[Random, bytes], bytes], ...] = (
    flipped, truncated, _replaced, _inserted, _removed, _recoded
)  # fmt: skip


def _any_path(random: Random, values: Any, root: JsonPath, spared: tuple[str, ...]) -> JsonPath:
    """The path of a value below `root`, found by walking down: what is deep is not more likely for its number."""
    path = root
    while True:
        children = [key for key in _keys(_at(values, path)) if path != root or key not in spared]
        if not children or (path != root and random.random() > DESCEND):
            return path
        path = (*path, random.choice(children))


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []


def _at(values: Any, path: JsonPath) -> Any:
    for key in path:
        values = values[key]
    return values


def _change(random: Random, values: Any, path: JsonPath) -> None:
    """Change the value at a path, or its container. Nothing can be changed at the path of no key."""
    if not path:
        return
    container, key = _at(values, path[:-1]), path[-1]
    random.choice(CHANGES)(random, container, key)


def _delete(random: Random, container: Any, key: Any) -> None:
    del container[key]


def _replace(random: Random, container: Any, key: Any) -> None:
    container[key] = copy.deepcopy(random.choice(VALUES))


def _adjust(random: Random, container: Any, key: Any) -> None:
    """A value of the same type."""
    value = container[key]
    if isinstance(value, bool):
        container[key] = not value
    elif isinstance(value, (int, float)):
        container[key] = random.choice((value + 1, value - 1, -value, value * 1000, value * 10**9, value / 3))
    elif isinstance(value, str):
        position = random.randrange(len(value) + 1)
        inserted = random.choice(("\0", "\n", "x", "/", "..", "*", "(", "\ud800", " "))
        container[key] = random.choice(
            (value[:position] + inserted + value[position:], value[:position], value.upper())
        )
    elif isinstance(value, list) and value:
        container[key] = random.choice((value[:-1], [*value, value[0]], value[::-1], value * 50, [value]))
    else:
        _replace(random, container, key)


def _duplicate(random: Random, container: Any, key: Any) -> None:
    if isinstance(container, dict):
        container[f"{key}{TWICE}"] = copy.deepcopy(random.choice((*VALUES, *container.values())))
    else:
        container.insert(key, copy.deepcopy(container[key]))


def _add(random: Random, container: Any, key: Any) -> None:
    value = copy.deepcopy(random.choice((*VALUES, container[key])))
    if isinstance(container, dict):
        name = random.choice((f"{key}x", "", "\0", "x" * LONG, "__class__", "self", "metadata", "../victim"))
        container[name] = value
    else:
        container.append(value)


def _swap(random: Random, container: Any, key: Any) -> None:
    other = random.choice(_keys(container))
    container[key], container[other] = container[other], container[key]


CHANGES: tuple[Callable[[Random, Any, Any], None], ...] = (
    _delete, _replace, _replace, _replace, _adjust, _adjust, _adjust, _duplicate, _add, _swap
)  # fmt: skip


def _text(values: Any) -> str:
    text = json.dumps(values, indent=1)
    for name, literal in LITERALS.items():
        text = text.replace(f'"{name}"', literal)
    return text.replace(f'{TWICE}"', '"')


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined_safetensors(header: bytes, data: bytes) -> bytes:
    """A safetensors file of a header and data."""
    return len(header).to_bytes(8, "little") + header + data
