"""Fonts of Debian packages: search by characters, drawing, and a stable order of the packages for splits."""

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
    """A font file and the package that it is from."""

    package: str
    path: Path


def find_fonts(root: Path, packages: Sequence[str], characters: str, per_package: int = 5) -> list[Font]:
    """Find fonts that can draw all of `characters`, at most `per_package` in each of `packages`."""
    fonts: list[Font] = []
    for package in packages:
        files = sorted(p for p in (root / package).rglob("*") if p.suffix.lower() in {".ttf", ".otf", ".ttc"})
        # an even spread over the files of a package covers its families
        files = files[:: max(1, len(files) // per_package)]
        fonts += [Font(package, file) for file in files if _can_draw(file, characters)][:per_package]
    return fonts


def _can_draw(path: Path, characters: str) -> bool:
    try:
        cmap = TTFont(path, fontNumber=0, lazy=True).getBestCmap() or {}
        if not all(ord(c) in cmap for c in characters):
            return False
        masks = [draw(Font("", path), c) for c in characters]
    except Exception:  # damaged or unusual fonts raise many kinds of errors; they are skipped
        return False
    # some fonts map all characters, but draw nothing or the same box for each
    return len({mask.tobytes() for mask in masks if mask is not None}) == len(characters)


def draw(font: Font, character: str) -> np.ndarray | None:
    """Draw a character, centred: coverage as uint8 (CANVAS, CANVAS), or None for an empty glyph."""
    typeface = ImageFont.truetype(str(font.path), 64, index=0)
    image = Image.new("L", (3 * CANVAS, 3 * CANVAS))
    ImageDraw.Draw(image).text((CANVAS, CANVAS), character, fill=255, font=typeface)
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
    """Map the name of a package to a fixed number in [0, 1); splits are intervals of it."""
    return int(hashlib.sha256(package.encode()).hexdigest()[:8], 16) / 2**32
