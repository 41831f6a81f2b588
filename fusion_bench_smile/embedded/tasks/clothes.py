"""Clothing photographs (Debian `dataset-fashion-mnist`, MIT)."""

from collections.abc import Callable

classnames: list[str] = [
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]

templates: list[Callable[[str], str]] = [
    lambda c: f"a photo of a {c}.",
    lambda c: f"a gray photo of a {c}, a piece of clothing.",
    lambda c: f"clothing: {c}.",
]
