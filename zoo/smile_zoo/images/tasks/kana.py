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
    "si",
    "su",
    "se",
    "so",
    "ta",
    "ti",
    "tu",
    "te",
    "to",
]

templates: list[Callable[[str], str]] = [
    lambda c: f"the hiragana letter {c}.",
    lambda c: f"a scan of the hiragana letter {c}.",
    lambda c: f"the hiragana letter {c}, handwritten.",
]
