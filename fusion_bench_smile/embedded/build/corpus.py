"""The pretraining corpus: small sprites with captions, and their augmentation.

No image of a task is in it. Two tasks share *kinds* of material with it, from other parts: letters and kana of fonts
that the tasks don't use, and image regions of the textures and planets that the tasks' test splits don't use.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .fonts import CANVAS, draw
from .images import CUTS, HIRAGANA, SIZE, pretraining_fonts, read_photographs, read_planets, read_textures
from .material import KANA_FONTS, LATIN_FONTS

log = logging.getLogger(__name__)

SPRITE = 36  # pixels: what a sprite is stored at; it is drawn at 28
PICTURE, GLYPH, CROP = 0, 1, 2
# How often each group is drawn: more of what the tasks are about, less of what has a caption of its own for every
# picture. A sprite belongs to the first group of its kind whose pattern its caption matches.
GROUPS = (
    ("digits", GLYPH, r"the digit", 0.13),
    ("capitals", GLYPH, r"the capital letter", 0.13),
    ("hiragana", GLYPH, r"the hiragana", 0.13),
    ("other characters", GLYPH, r"", 0.05),
    ("textures", CROP, r"a .* texture", 0.06),
    ("planets", CROP, r"the surface of", 0.04),
    ("flags", PICTURE, r"the flag of", 0.16),
    (
        "animals",
        PICTURE,
        r".*\b(bear|bird|cat|cow|dog|elephant|giraffe|horse|sheep|zebra|lion|tiger|rabbit|pig|goat|deer|camel|duck|ram"
        r"|wolf|fox|mouse|monkey|owl|chicken|hippo\w*|rhino\w*)\b",
        0.09,
    ),
    (
        "clothes",
        PICTURE,
        r".*\b(shirt|t-shirt|trousers|jeans|pullover|sweater|dress|coat|jacket|sandal|shoe|sneaker|boots?|bag|handbag"
        r"|backpack|purse|hat|socks?|skirt|scarf|gloves?|shorts|kimono|vest)\b",
        0.07,
    ),
    ("other pictures", PICTURE, r"", 0.14),
)


@dataclass(frozen=True)
class Corpus:
    """Sprites (N, 36, 36, 4) uint8 RGBA, kinds and captions (N,), backgrounds (M, 28, 28, 3) uint8."""

    sprites: np.ndarray
    kinds: np.ndarray
    captions: list[str]
    backgrounds: np.ndarray

    def probability(self) -> np.ndarray:
        """How often each sprite is drawn, (N,) float64 with sum one."""
        probability = np.zeros(len(self.captions))
        for name, kind, pattern, share in GROUPS:
            matches = np.array([bool(re.match(pattern, caption)) for caption in self.captions])
            group = (self.kinds == kind) & matches & (probability == 0)
            log.info("group %s: %d sprites, share %.2f", name, group.sum(), share)
            probability[group] = share / group.sum()
        return probability / probability.sum()


Entry = tuple[np.ndarray, int, str]


def build_corpus(root: Path) -> Corpus:
    parts = {
        "emoji": _emoji(root),
        "stamps": _stamps(root),
        "clipart": _clipart(root),
        "characters": _characters(root),
        "textures": _textures(root),
        "planets": _planets(root),
    }
    sprites, kinds, captions = [], [], []
    for name, part in parts.items():
        entries = list(part)
        log.info("corpus: %d %s", len(entries), name)
        for sprite, kind, caption in entries:
            sprites.append(sprite)
            kinds.append(kind)
            captions.append(caption)
    return Corpus(np.stack(sprites), np.asarray(kinds), captions, _backgrounds(root))


def _sprite(image: Image.Image) -> np.ndarray:
    """Any picture as a centred RGBA square."""
    image = image.convert("RGBA")
    box = image.getchannel("A").getbbox()
    image = image.crop(box) if box else image
    image.thumbnail((SPRITE, SPRITE), Image.Resampling.BOX, reducing_gap=2.0)
    square = Image.new("RGBA", (SPRITE, SPRITE))
    square.paste(image, ((SPRITE - image.width) // 2, (SPRITE - image.height) // 2))
    return np.asarray(square)


def _emoji(root: Path) -> Iterator[Entry]:
    for vendor in ("google", "twitter"):
        package = root / f"emoji-datasource-{vendor}/package"
        for emoji in json.loads((package / "emoji.json").read_text()):
            file = package / f"img/{vendor}/64/{emoji['image']}"
            if not file.exists():
                continue
            name = emoji["name"].lower().replace("regional indicator symbol letters ", "flag ")
            if emoji["category"] == "Flags":
                name = re.sub(r"^flag[:,]? |\bflag\b", "", emoji["name"].lower()).strip(" :,")
                name = f"the flag of {name.removesuffix(' flag')}"
            yield _sprite(Image.open(file)), PICTURE, name
            short = emoji["short_name"].replace("_", " ").replace("-", " ")
            if emoji["category"] != "Flags" and short != name:
                yield _sprite(Image.open(file)), PICTURE, short


def _stamps(root: Path) -> Iterator[Entry]:
    for file in sorted((root / "tuxpaint-stamps-default").rglob("stamps/**/*.png")):
        text = file.with_suffix(".txt")
        if text.exists() and not file.stem.endswith("_mirror"):
            caption = text.read_text(errors="replace").splitlines()[0].strip().rstrip(".!").lower()
            yield _sprite(Image.open(file)), PICTURE, caption[:80]


def _clipart(root: Path) -> Iterator[Entry]:
    base = next((root / "openclipart-png").rglob("png"))
    for file in sorted(base.rglob("*.png")):
        folder = str(file.relative_to(base).parent)
        if folder.startswith(("shapes/stars", "shapes/jigsaw", "special", "logos", "office")):
            continue
        words = re.sub(r"\.svg|[_\-.,()]+|\d+", " ", file.stem.lower()).split()
        words = [w for w in words if len(w) > 1][:4]
        topic = folder.split("/")[-1].replace("_", " ").replace("-theme", "")
        if "flags" in folder and words:
            caption = f"the flag of {' '.join(words)}"
        else:
            caption = " ".join(words) + f", {topic}" if words else topic
        try:
            yield _sprite(Image.open(file)), PICTURE, caption
        except (OSError, Image.DecompressionBombError) as error:
            log.warning("clipart: skipping %s: %s", file.name, error)


def _characters(root: Path) -> Iterator[Entry]:
    alphabets = {
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789": LATIN_FONTS,
        "0123456789": LATIN_FONTS,
        "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩαβγδεζηθικλμνξοπρστυφχψω": LATIN_FONTS,
        "БГДЖЗИЛПУФЦЧШЩЪЫЭЮЯбвгджзклмнптфцчшщыьэюя": LATIN_FONTS,
        HIRAGANA + "なにぬねのはひふへほまみむめもやゆよらりるれろわをん": KANA_FONTS,
        "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロワヲン": KANA_FONTS,
        "一二三四五六七八九十日月火水木金土山川田人口手目耳足力大小上下左右中": KANA_FONTS,
    }
    for alphabet, packages in alphabets.items():
        fonts = pretraining_fonts(root, packages, alphabet)
        log.info("characters: %d fonts for %s…", len(fonts), alphabet[:6])
        for font in fonts:
            for character in alphabet:
                ink = draw(font, character)
                if ink is not None:
                    small = (
                        Image.fromarray(ink)
                        .crop((6, 6, CANVAS - 6, CANVAS - 6))
                        .resize((SPRITE, SPRITE), Image.Resampling.BOX)
                    )
                    sprite = np.full((SPRITE, SPRITE, 4), 255, dtype=np.uint8)
                    sprite[..., 3] = np.asarray(small)
                    yield sprite, GLYPH, _character_name(character)


def _character_name(character: str) -> str:
    name = unicodedata.name(character).lower()
    name = name.removeprefix("latin ").replace("cjk unified ideograph-", "chinese character ")
    return f"the {name}"


def _regions(image: Image.Image, rng: np.random.Generator, count: int, window: tuple[int, int]) -> Iterator[np.ndarray]:
    """Crops of the band that the tasks train on; their validation and test bands stay unseen."""
    band = int(CUTS["train"][1] * image.width)
    for _ in range(count):
        side = min(int(rng.integers(*window)), band, image.height)
        left, top = int(rng.integers(0, band - side + 1)), int(rng.integers(0, image.height - side + 1))
        crop = image.crop((left, top, left + side, top + side)).resize((SPRITE, SPRITE), Image.Resampling.BOX)
        yield np.asarray(crop.convert("RGBA"))


def _textures(root: Path) -> Iterator[Entry]:
    rng = np.random.default_rng(11)
    for material, images in read_textures(root).items():
        # few crops a material, whatever the number of images: the expert must have something to learn
        for image in [images[i] for i in rng.permutation(len(images))[:6]]:
            for crop in _regions(image, rng, 4, (44, 80)):
                yield crop, CROP, f"a {material} texture"


def _planets(root: Path) -> Iterator[Entry]:
    rng = np.random.default_rng(12)
    for name, image in read_planets(root).items():
        for crop in _regions(image, rng, 12, (40, 90)):
            yield crop, CROP, f"the surface of {name}"


def _backgrounds(root: Path) -> np.ndarray:
    rng = np.random.default_rng(13)
    photographs = read_photographs(root)
    mine = photographs[: int(CUTS["train"][1] * len(photographs))]
    crops = []
    for _ in range(3000):
        image = mine[rng.integers(len(mine))]
        side = int(rng.integers(60, min(image.size)))
        left, top = rng.integers(image.width - side + 1), rng.integers(image.height - side + 1)
        crops.append(
            np.asarray(image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BOX))
        )
    return np.stack(crops)


PROMPTS = {
    PICTURE: ("{}", "{}", "a picture of {}", "a photo of {}", "a drawing of {}", "a silhouette of {}"),
    GLYPH: ("{}", "a printed {}", "a scan of {}", "{}, handwritten"),
    CROP: ("{}", "a photo of {}"),
}


def caption_variants(corpus: Corpus) -> Iterable[str]:
    for caption, kind in zip(corpus.captions, corpus.kinds, strict=True):
        for prompt in PROMPTS[int(kind)]:
            yield prompt.format(caption)


def augment(corpus: Corpus, index: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Draw a batch of sprites: images (N, 3, 28, 28) float32 in [0, 1]."""
    n = len(index)
    sprites = torch.from_numpy(corpus.sprites[index]).permute(0, 3, 1, 2).float().div_(255)  # (N, 4, 36, 36)
    kinds = torch.from_numpy(corpus.kinds[index])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    angle = torch.randn(n, generator=generator) * 0.15
    zoom = uniform(0.9, 1.35, n)
    zoom = torch.where(kinds == CROP, uniform(0.6, 0.95, n), zoom)
    stretch = uniform(0.85, 1.18, n)
    mirror = torch.where((kinds != GLYPH) & (uniform(0, 1, n) < 0.3), -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * zoom * mirror, -angle.sin() * zoom
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * zoom * stretch * mirror, angle.cos() * zoom * stretch
    theta[:, :, 2] = uniform(-0.12, 0.12, n, 2)
    grid = F.affine_grid(theta, (n, 4, SIZE, SIZE), align_corners=False)
    # half of the characters are bent smoothly and get another stroke, as a hand would write them
    bent = (kinds == GLYPH) & (uniform(0, 1, n) < 0.5)
    bend = F.interpolate(torch.randn(n, 2, 4, 4, generator=generator), size=SIZE, mode="bicubic", align_corners=True)
    grid = grid + 0.08 * bent[:, None, None, None] * bend.permute(0, 2, 3, 1)
    alpha = sprites[:, 3:]
    drawn = F.grid_sample(torch.cat([sprites[:, :3] * alpha, alpha], 1), grid, align_corners=False, mode="bilinear")
    crops = F.grid_sample(sprites[:, :3], grid, align_corners=False, mode="bilinear", padding_mode="reflection")
    color, ink = drawn[:, :3], drawn[:, 3:]
    stroke = torch.where(bent, uniform(0, 1, n), torch.full((n,), 0.5))[:, None, None, None]
    ink = torch.where(stroke < 0.25, -F.max_pool2d(-ink, 2, 1, 1)[..., :SIZE, :SIZE], ink)
    ink = torch.where(stroke > 0.7, F.max_pool2d(ink, 2, 1, 1)[..., :SIZE, :SIZE], ink)

    style = uniform(0, 1, n)
    flat = uniform(0, 1, n, 3, 1, 1)
    grays = uniform(0, 1, n, 1, 1, 1).expand(-1, 3, 1, 1)
    flat = torch.where((uniform(0, 1, n) < 0.6)[:, None, None, None], grays, flat)
    photographs = torch.from_numpy(corpus.backgrounds[rng.integers(len(corpus.backgrounds), size=n)])
    photographs = photographs.permute(0, 3, 1, 2).float().div_(255)
    picture_paper = flat.expand(-1, -1, SIZE, SIZE).clone()
    picture_paper[style < 0.35] = photographs[style < 0.35]
    picture_paper[(style >= 0.35) & (style < 0.6)] = 0.0
    picture_paper[(style >= 0.6) & (style < 0.8)] = 1.0
    picture = color + picture_paper * (1 - ink)

    dark = uniform(0, 0.35, n, 1, 1, 1)
    light = uniform(0.65, 1, n, 1, 1, 1)
    white_on_black = (style < 0.45)[:, None, None, None]
    pen, paper = torch.where(white_on_black, light, dark), torch.where(white_on_black, dark, light)
    pen, paper = torch.where(white_on_black, pen.clamp(min=0.9), pen), torch.where(white_on_black, paper * 0.2, paper)
    glyph = paper + (pen - paper) * ink
    colored = (uniform(0, 1, n) < 0.15)[:, None, None, None]
    glyph = torch.where(colored, flat + (1 - flat - flat) * ink, glyph).expand(-1, 3, -1, -1)

    # silhouettes of pictures: the ink alone, only where the outline says something (not a filled square)
    hollow = alpha.mean(dim=(1, 2, 3)) < 0.6
    silhouette = (kinds == PICTURE) & hollow & (uniform(0, 1, n) < 0.25)
    image = torch.where((kinds == PICTURE)[:, None, None, None], picture, glyph)
    image = torch.where((kinds == CROP)[:, None, None, None], crops, image)
    image = torch.where(silhouette[:, None, None, None], paper + (pen - paper) * ink, image)
    gray = (uniform(0, 1, n) < 0.25)[:, None, None, None]
    image = torch.where(gray, image.mean(1, keepdim=True), image)
    image = (image - 0.5) * uniform(0.7, 1.15, n, 1, 1, 1) + 0.5 + uniform(-0.12, 0.12, n, 1, 1, 1)
    image = image + torch.randn(image.shape, generator=generator) * uniform(0, 0.05, n, 1, 1, 1)
    return image.clamp_(0, 1)
