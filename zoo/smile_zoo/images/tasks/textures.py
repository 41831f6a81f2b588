"""Material textures (Debian `ufoai-textures`; GPL-2+, parts CC-BY and CC-BY-SA)."""

from collections.abc import Callable

classnames: list[str] = ["brick", "carpet", "concrete", "dirt", "grass", "metal", "rock", "roof", "wallpaper", "wood"]

templates: list[Callable[[str], str]] = [
    lambda c: f"a {c} texture.",
    lambda c: f"a photo of a {c} texture.",
]
