"""Latin capitals rendered in real fonts (Debian font packages)."""

from collections.abc import Callable

classnames: list[str] = [
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "g",
    "h",
    "i",
    "j",
    "k",
    "l",
    "m",
    "n",
    "o",
    "p",
    "q",
    "r",
    "s",
    "t",
    "u",
    "v",
    "w",
    "x",
    "y",
    "z",
]

templates: list[Callable[[str], str]] = [
    lambda c: f"the capital letter {c}.",
    lambda c: f"a scan of the capital letter {c}.",
    lambda c: f"a printed capital letter {c}.",
]
