"""Animal silhouettes (PyPI `animal-shape-mnist`, MIT)."""

from collections.abc import Callable

classnames: list[str] = ["bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"]

templates: list[Callable[[str], str]] = [
    lambda c: f"a silhouette of {c}.",
    lambda c: f"a drawing of {c}.",
    lambda c: f"{c}.",
]
