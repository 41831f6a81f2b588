"""Images of the fourteen tasks, 56×56 pixels; no source (file, font, region, photograph) is in two splits."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from recipes.images.fonts import bucket
from recipes.images.sources import KANA_FONTS, LATIN_FONTS
from recipes.images.tasks import (
    COUNTS,
    CUTS,
    FLAG_CODES,
    HIRAGANA,
    Images,
    build_tasks,
    flag_images,
    glyph_images,
    random_crops,
    read_photographs,
    read_textures,
)
from smile_zoo.images.tasks import planets

log = logging.getLogger(__name__)

SIZE = 56
SMALL = ("digits", "clothes", "animals")  # tasks of the image benchmark, whose images have 28×28 pixels anyway
GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
MORE_FLAGS = ["at", "be", "bg", "ch", "co", "cz", "dk", "ee", "eg", "et", "hr", "hu", "id", "ie", "ir", "is", "ke",
              "lt", "lv", "ma", "ng", "nl", "pe", "ph", "pk", "pl", "pt", "ro", "rs", "ru", "sa", "si", "sk", "th",
              "ua", "ve", "vn"]  # fmt: skip
BODIES = [*planets.classnames, "saturn", "uranus", "neptune", "pluto", "titan", "triton", "iapetus", "rhea", "dione",
          "tethys", "enceladus", "mimas", "ariel", "titania"]  # fmt: skip
CLIPART = ("animals", "buildings", "food", "people", "plants", "recreation", "signs_and_symbols", "tools",
           "transportation")  # fmt: skip
MOST_OBJECTS = 8
PHOTOGRAPHS = 24


def build(root: Path) -> dict[str, Images]:
    """Build the splits of all tasks from the unpacked packages below `root`; the result is deterministic."""
    small = build_tasks(root, SMALL)
    textures, photographs = read_textures(root), read_photographs(root)
    bodies, regions = _bodies(root), photographs[:: len(photographs) // PHOTOGRAPHS][:PHOTOGRAPHS]
    builders: dict[str, Callable[[], Images]] = {
        "textures": partial(random_crops, dict(enumerate(textures.values())), (48, 110), 4, turn=True, size=SIZE),
        "planets": partial(random_crops, dict(enumerate(bodies)), (48, 90), 5, turn=False, size=SIZE),
        "letters": partial(glyph_images, root, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", LATIN_FONTS, 6, SIZE),
        "kana": partial(glyph_images, root, HIRAGANA, KANA_FONTS, 7, SIZE),
        "flags": partial(flag_images, root, [*FLAG_CODES, *MORE_FLAGS], SIZE),
        "emoji": partial(_pictures, _emoji(root), 9),
        "clipart": partial(_pictures, _clipart(root), 10),
        "counts": partial(_counts, photographs),
        "photographs": partial(random_crops, {i: [image] for i, image in enumerate(regions)}, (48, 100), 12, turn=False,
                               size=SIZE),
        "greek": partial(glyph_images, root, GREEK, LATIN_FONTS, 13, SIZE),
        "orientations": partial(_orientations, photographs),
    }  # fmt: skip
    tasks = {name: small[name] for name in SMALL}
    for name, make in builders.items():
        tasks[name] = make()
        log.info("%s: %s", name, {s: (x.shape, int(y.max()) + 1) for s, (x, y) in tasks[name].items()})
    return tasks


def _bodies(root: Path) -> list[list[Image.Image]]:
    """The surface maps of planets and moons, 1024×384 pixels; a cylindrical map distorts the poles, which are cut."""
    folder = next((root / "stellarium-data").rglob("textures"))
    files = [folder / f"{'earth_cmap' if name == 'earth' else name}.png" for name in BODIES]
    images = [Image.open(file).convert("RGB").resize((1024, 512), Image.Resampling.BICUBIC) for file in files]
    return [[image.crop((0, 64, 1024, 448))] for image in images]


def _emoji(root: Path) -> dict[str, list[tuple[str, Path]]]:
    """Category → pairs of an emoji's code and a picture of it, by two vendors."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for vendor in ("google", "twitter"):
        folder = root / f"emoji-datasource-{vendor}" / "package"
        for entry in json.loads((folder / "emoji.json").read_text()):
            file = folder / "img" / vendor / "64" / entry["image"]
            if entry["category"] != "Component" and file.exists():
                found.setdefault(entry["category"], []).append((entry["unified"], file))
    return dict(sorted(found.items()))


def _clipart(root: Path) -> dict[str, list[tuple[str, Path]]]:
    """Category → pairs of a name and a picture."""
    folder = next((root / "openclipart-png").rglob("png"))
    return {name: [(file.stem, file) for file in sorted((folder / name).rglob("*.png"))] for name in CLIPART}


def _pictures(classes: Mapping[str, Sequence[tuple[str, Path]]], seed: int) -> Images:
    """Pictures on a coloured ground, scaled, turned and shifted slightly; each split has pictures of its own."""
    splits = {}
    for split, (low, high) in CUTS.items():
        rng = np.random.default_rng([seed, list(CUTS).index(split)])
        files = [[file for key, file in pairs if low <= bucket(key) < high] for pairs in classes.values()]
        images, labels = [], []
        for index in range(COUNTS[split]):
            label = index % len(files)
            file = files[label][rng.integers(len(files[label]))]
            images.append(_on_ground(_thumbnail(file), rng))
            labels.append(label)
        splits[split] = (np.stack(images), np.asarray(labels))
    return splits


def _thumbnail(file: Path) -> Image.Image:
    """A picture with its alpha channel, at most 96 pixels wide and high."""
    image = Image.open(file).convert("RGBA")
    image.thumbnail((96, 96), Image.Resampling.BOX)
    return image


def _on_ground(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
    ground = Image.new("RGBA", (96, 96), tuple(rng.integers(150, 256, 3).tolist()))
    scale = float(rng.uniform(0.7, 0.95)) * 96 / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    turned = picture.resize(size).rotate(float(rng.normal(0, 8)), resample=Image.Resampling.BICUBIC)
    corner = tuple(int(rng.integers(0, 96 - side + 1)) for side in turned.size)
    ground.alpha_composite(turned, corner)
    return np.asarray(ground.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))


def _backgrounds(photographs: Sequence[Image.Image], split: str) -> Sequence[Image.Image]:
    low, high = CUTS[split]
    return photographs[int(low * len(photographs)) : int(high * len(photographs))]


def _square(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random square of a photograph, 112×112 pixels."""
    side = int(rng.integers(120, min(photograph.size)))
    left, top = (int(rng.integers(extent - side + 1)) for extent in photograph.size)
    return photograph.crop((left, top, left + side, top + side)).resize((112, 112), Image.Resampling.BOX)


def _counts(photographs: Sequence[Image.Image]) -> Images:
    """One to eight equal shapes in front of a photograph; the class is their number."""
    splits = {}
    for split in CUTS:
        rng = np.random.default_rng([11, list(CUTS).index(split)])
        backgrounds = _backgrounds(photographs, split)
        images, labels = [], []
        for index in range(COUNTS[split]):
            label = index % MOST_OBJECTS
            scene = _square(backgrounds[int(rng.integers(len(backgrounds)))], rng)
            pen, draw = ImageDraw.Draw(scene), rng.choice(["ellipse", "rectangle"])
            colour = tuple(rng.integers(0, 256, 3).tolist())
            for cell in rng.permutation(16)[: label + 1]:  # of a grid, so that shapes don't touch
                x, y = 28 * (cell % 4) + rng.uniform(2, 8), 28 * (cell // 4) + rng.uniform(2, 8)
                box = (x, y, x + rng.uniform(13, 18), y + rng.uniform(13, 18))
                getattr(pen, draw)(box, fill=colour, outline=(255, 255, 255))
            images.append(np.asarray(scene.resize((SIZE, SIZE), Image.Resampling.BOX)))
            labels.append(label)
        splits[split] = (np.stack(images), np.asarray(labels))
    return splits


def _orientations(photographs: Sequence[Image.Image]) -> Images:
    """Photographs turned by a multiple of 90 degrees, which is the class."""
    splits = {}
    for split in CUTS:
        rng = np.random.default_rng([14, list(CUTS).index(split)])
        backgrounds = _backgrounds(photographs, split)
        images, labels = [], []
        for index in range(COUNTS[split]):
            label = index % 4
            scene = _square(backgrounds[int(rng.integers(len(backgrounds)))], rng).rotate(90 * label)
            images.append(np.asarray(scene.resize((SIZE, SIZE), Image.Resampling.BOX)))
            labels.append(label)
        splits[split] = (np.stack(images), np.asarray(labels))
    return splits
