"""Hiragana rendered in real fonts (Debian font packages)."""

from collections.abc import Callable

classnames: list[str] = [
    "a",
    "i",
    "u",
    "e",
    "o",
    "ka",
    "ki",
    "ku",
    "ke",
    "ko",
    "sa",
    "shi",
    "su",
    "se",
    "so",
    "ta",
    "chi",
    "tsu",
    "te",
    "to",
]

templates: list[Callable[[str], str]] = [
    lambda c: f"the hiragana letter {c}.",
    lambda c: f"the kana {c}.",
    lambda c: f"the japanese letter {c}.",
]
