"""Pretraining corpus: small sprites with captions, and their augmentation.

The corpus holds no image of a task. Letters and kana come from fonts that the tasks do not use, textures and planets
from image regions outside the validation and test splits of the tasks.
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

from recipes.images.fonts import CANVAS, draw
from recipes.images.sources import KANA_FONTS, LATIN_FONTS
from recipes.images.tasks import CUTS, HIRAGANA, SIZE, pretraining_fonts, read_photographs, read_planets, read_textures

log = logging.getLogger(__name__)

SPRITE = 36  # side of a stored sprite, in pixels; augmented images have 28
PICTURE, GLYPH, CROP = 0, 1, 2
# Name, kind, pattern of captions and sampling probability of each group. Groups that resemble the tasks are sampled
# more often than groups with a distinct caption for every picture. A sprite is in the first group that it matches.
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
    """Sprites with captions.

    Attributes:
        sprites: (N, 36, 36, 4), uint8, RGBA.
        kinds: ``PICTURE``, ``GLYPH`` or ``CROP`` of each sprite, (N,).
        captions: of each sprite, N.
        backgrounds: crops of photographs, (M, 28, 28, 3), uint8.
    """

    sprites: np.ndarray
    kinds: np.ndarray
    captions: list[str]
    backgrounds: np.ndarray

    def probability(self) -> np.ndarray:
        """Sampling probability of each sprite: (N,), float64."""
        probability = np.zeros(len(self.captions))
        for name, kind, pattern, share in GROUPS:
            matches = np.array([bool(re.match(pattern, caption)) for caption in self.captions])
            group = (self.kinds == kind) & matches & (probability == 0)
            log.info("group %s: %d sprites, share %.2f", name, group.sum(), share)
            probability[group] = share / group.sum()
        return probability / probability.sum()


Entry = tuple[np.ndarray, int, str]


def build_corpus(root: Path) -> Corpus:
    """Build the corpus from the unpacked packages below `root`; the result is deterministic."""
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
    """Crop, scale and centre a picture on a transparent square: (SPRITE, SPRITE, 4), uint8."""
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
    """Crop at random within the band of the training splits; the validation and test bands are left out."""
    band = int(CUTS["train"][1] * image.width)
    for _ in range(count):
        side = min(int(rng.integers(*window)), band, image.height)
        left, top = int(rng.integers(0, band - side + 1)), int(rng.integers(0, image.height - side + 1))
        crop = image.crop((left, top, left + side, top + side)).resize((SPRITE, SPRITE), Image.Resampling.BOX)
        yield np.asarray(crop.convert("RGBA"))


def _textures(root: Path) -> Iterator[Entry]:
    rng = np.random.default_rng(11)
    for material, images in read_textures(root).items():
        # few crops per material, so that the expert has something left to learn
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
    training = photographs[: int(CUTS["train"][1] * len(photographs))]
    crops = []
    for _ in range(3000):
        image = training[rng.integers(len(training))]
        side = int(rng.integers(60, min(image.size)))
        left, top = (int(rng.integers(extent - side + 1)) for extent in image.size)
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
    """Yield all prompts of all captions."""
    for caption, kind in zip(corpus.captions, corpus.kinds, strict=True):
        for prompt in PROMPTS[int(kind)]:
            yield prompt.format(caption)


class _Random:
    """Random numbers of one batch of N sprites; the order of the calls determines the values."""

    def __init__(self, count: int, rng: np.random.Generator) -> None:
        self.count, self.rng = count, rng
        self.generator = torch.Generator().manual_seed(int(rng.integers(2**62)))

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform numbers of shape (N, *shape)."""
        return torch.rand(self.count, *shape, generator=self.generator) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers of shape (N, *shape)."""
        return torch.randn(self.count, *shape, generator=self.generator)

    def chance(self, probability: float) -> Tensor:
        """True with this probability: (N,)."""
        return self.uniform(0, 1) < probability


def augment(corpus: Corpus, index: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Augment a batch of sprites.

    Args:
        corpus: the corpus.
        index: of the sprites, (N,).
        rng: source of all random numbers.

    Returns:
        Images (N, 3, 28, 28), float32 in [0, 1].
    """
    sprites = torch.from_numpy(corpus.sprites[index]).permute(0, 3, 1, 2).float().div_(255)  # (N, 4, 36, 36)
    kinds = torch.from_numpy(corpus.kinds[index])
    random = _Random(len(index), rng)
    color, ink, crops = _transform(sprites, kinds, random)
    style, flat = random.uniform(0, 1), random.uniform(0, 1, 3, 1, 1)
    grays = random.uniform(0, 1, 1, 1, 1).expand(-1, 3, 1, 1)
    flat = torch.where(_per_image(random.chance(0.6)), grays, flat)
    picture = color + _picture_paper(corpus, style, flat, random) * (1 - ink)
    pen, paper = _pen_and_paper(style, random)
    glyph = paper + (pen - paper) * ink
    glyph = torch.where(_per_image(random.chance(0.15)), flat + (1 - flat - flat) * ink, glyph).expand(-1, 3, -1, -1)
    # some pictures become silhouettes, unless they fill their square
    hollow = sprites[:, 3:].mean(dim=(1, 2, 3)) < 0.6
    silhouette = (kinds == PICTURE) & hollow & random.chance(0.25)
    image = torch.where(_per_image(kinds == PICTURE), picture, glyph)
    image = torch.where(_per_image(kinds == CROP), crops, image)
    image = torch.where(_per_image(silhouette), paper + (pen - paper) * ink, image)
    return _photometric(image, random)


def _per_image(values: Tensor) -> Tensor:
    """Values of each image, (N,), for broadcasting: (N, 1, 1, 1)."""
    return values[:, None, None, None]


def _transform(sprites: Tensor, kinds: Tensor, random: _Random) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a random geometric transform: colour times ink (N, 3, 28, 28), ink (N, 1, 28, 28), crops (N, 3, 28, 28)."""
    grid = F.affine_grid(_affine(kinds, random), [len(sprites), 4, SIZE, SIZE], align_corners=False)
    # handwriting: half of the characters are bent smoothly and get another stroke width
    bent = (kinds == GLYPH) & random.chance(0.5)
    bend = F.interpolate(random.normal(2, 4, 4), size=SIZE, mode="bicubic", align_corners=True)
    grid = grid + 0.08 * _per_image(bent) * bend.permute(0, 2, 3, 1)
    alpha = sprites[:, 3:]
    drawn = F.grid_sample(torch.cat([sprites[:, :3] * alpha, alpha], 1), grid, align_corners=False, mode="bilinear")
    crops = F.grid_sample(sprites[:, :3], grid, align_corners=False, mode="bilinear", padding_mode="reflection")
    color, ink = drawn[:, :3], drawn[:, 3:]
    stroke = _per_image(torch.where(bent, random.uniform(0, 1), torch.full((len(sprites),), 0.5)))
    ink = torch.where(stroke < 0.25, -F.max_pool2d(-ink, 2, 1, 1)[..., :SIZE, :SIZE], ink)
    ink = torch.where(stroke > 0.7, F.max_pool2d(ink, 2, 1, 1)[..., :SIZE, :SIZE], ink)
    return color, ink, crops


def _affine(kinds: Tensor, random: _Random) -> Tensor:
    """Random rotation, zoom, stretch, reflection and shift: (N, 2, 3)."""
    angle = random.normal() * 0.15
    zoom = random.uniform(0.9, 1.35)
    zoom = torch.where(kinds == CROP, random.uniform(0.6, 0.95), zoom)
    stretch = random.uniform(0.85, 1.18)
    mirror = torch.where((kinds != GLYPH) & random.chance(0.3), -1.0, 1.0)
    theta = torch.zeros(len(kinds), 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * zoom * mirror, -angle.sin() * zoom
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * zoom * stretch * mirror, angle.cos() * zoom * stretch
    theta[:, :, 2] = random.uniform(-0.12, 0.12, 2)
    return theta


def _picture_paper(corpus: Corpus, style: Tensor, flat: Tensor, random: _Random) -> Tensor:
    """Backgrounds of pictures: a photograph, black, white or a flat colour by `style`: (N, 3, 28, 28)."""
    photographs = torch.from_numpy(corpus.backgrounds[random.rng.integers(len(corpus.backgrounds), size=len(style))])
    photographs = photographs.permute(0, 3, 1, 2).float().div_(255)
    paper = flat.expand(-1, -1, SIZE, SIZE).clone()
    paper[style < 0.35] = photographs[style < 0.35]
    paper[(style >= 0.35) & (style < 0.6)] = 0.0
    paper[(style >= 0.6) & (style < 0.8)] = 1.0
    return paper


def _pen_and_paper(style: Tensor, random: _Random) -> tuple[Tensor, Tensor]:
    """Gray values of ink and background, dark on light or light on dark by `style`: (N, 1, 1, 1) each."""
    dark, light = random.uniform(0, 0.35, 1, 1, 1), random.uniform(0.65, 1, 1, 1, 1)
    white_on_black = _per_image(style < 0.45)
    pen, paper = torch.where(white_on_black, light, dark), torch.where(white_on_black, dark, light)
    return torch.where(white_on_black, pen.clamp(min=0.9), pen), torch.where(white_on_black, paper * 0.2, paper)


def _photometric(image: Tensor, random: _Random) -> Tensor:
    """Random grayscale conversion, contrast, brightness and noise, clamped to [0, 1]."""
    image = torch.where(_per_image(random.chance(0.25)), image.mean(1, keepdim=True), image)
    contrast, brightness = random.uniform(0.7, 1.15, 1, 1, 1), random.uniform(-0.12, 0.12, 1, 1, 1)
    image = (image - 0.5) * contrast + 0.5 + brightness
    noise = random.normal(*image.shape[1:])
    return (image + noise * random.uniform(0, 0.05, 1, 1, 1)).clamp_(0, 1)
