"""Text of unknown origin as one line, for messages and tables."""

import unicodedata
from typing import Any

import yaml

TEXT_LENGTH = 200  # characters


def printable(value: object, limit: int = TEXT_LENGTH) -> str:
    r"""The text of a value as one line of printable characters; an ellipsis ends a text of more than `limit`.

    Line breaks, control characters, marks that change the direction of text, and lone surrogates are written as in
    Python's literals, e.g. ``\n``.
    """
    text = str(value)
    line = "".join(map(_printable_character, text[: limit + 1]))
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def shortened(value: object, limit: int = 120) -> str:
    """The first line of a text or an error for a message, see `printable`; other values as `repr` shows them."""
    text = str(value) if isinstance(value, (str, BaseException)) else repr(value)
    return printable(text.strip().partition("\n")[0], limit + 1)


def _printable_character(character: str) -> str:
    if character.isprintable():
        return character
    space = unicodedata.category(character) == "Zs"
    return " " if space else character.encode("unicode_escape").decode("ascii")


def as_yaml(value: Any) -> str:
    """A value as it is written on a command line."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
