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
    lambda c: f"a photo of {c}.",
    lambda c: f"a picture of {c}.",
    lambda c: f"{c}, clothes.",
]
