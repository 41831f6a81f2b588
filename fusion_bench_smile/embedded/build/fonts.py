"""Real fonts: which files hold a set of characters, split by package so that a test font's family is unseen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

CANVAS = 96  # pixels; glyphs are drawn large and scaled down afterwards


@dataclass(frozen=True)
class Font:
    package: str
    path: Path


def find_fonts(root: Path, packages: Sequence[str], characters: str, per_package: int = 5) -> list[Font]:
    """Fonts of `packages` that can draw every one of `characters`, at most `per_package` of each package."""
    found = []
    for package in packages:
        files = sorted(p for p in (root / package).rglob("*") if p.suffix.lower() in {".ttf", ".otf", ".ttc"})
        # an even spread over the package's files shows its different families first
        files = files[:: max(1, len(files) // per_package)]
        fonts = [Font(package, f) for f in files if _can_draw(f, characters)]
        found += fonts[:per_package]
    return found


def _can_draw(path: Path, characters: str) -> bool:
    try:
        cmap = TTFont(path, fontNumber=0, lazy=True).getBestCmap() or {}
        if not all(ord(c) in cmap for c in characters):
            return False
        masks = [draw(Font("", path), c) for c in characters]
    except Exception:  # fonts fail in as many ways as there are fonts; one that does is of no use here
        return False
    if any(m is None for m in masks):
        return False
    # a font that draws one box for every character has the cmap, but not the glyphs
    return len({m.tobytes() for m in masks}) == len(characters)


def draw(font: Font, character: str) -> np.ndarray | None:
    """The character's ink, centred, as a uint8 array of shape (CANVAS, CANVAS); None for an empty glyph."""
    drawn = ImageFont.truetype(str(font.path), 64, index=0)
    image = Image.new("L", (3 * CANVAS, 3 * CANVAS))
    ImageDraw.Draw(image).text((CANVAS, CANVAS), character, fill=255, font=drawn)
    box = image.getbbox()
    if box is None:
        return None
    glyph = image.crop(box)
    scale = 64 / max(glyph.size)
    glyph = glyph.resize(
        (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))), Image.Resampling.BICUBIC
    )
    out = Image.new("L", (CANVAS, CANVAS))
    out.paste(glyph, ((CANVAS - glyph.width) // 2, (CANVAS - glyph.height) // 2))
    array = np.asarray(out)
    return array if array.mean() > 4 else None


def bucket(package: str) -> float:
    """A fixed number in [0, 1) for a package: which split its fonts fall into."""
    return int(hashlib.sha256(package.encode()).hexdigest()[:8], 16) / 2**32
