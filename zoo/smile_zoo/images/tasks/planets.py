"""Surfaces of planets and moons (Debian `stellarium-data`, GPL-2+ and public domain)."""

from collections.abc import Callable

classnames: list[str] = ["mercury", "venus", "earth", "moon", "mars", "jupiter", "io", "europa", "ganymede", "callisto"]

templates: list[Callable[[str], str]] = [
    lambda c: f"the surface of {c}.",
    lambda c: f"a photo of the surface of {c}.",
]
