"""Images of the eight tasks as arrays of 28×28 pixels; no source (scan, font, region, photograph) is in two splits."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from recipes.images.fonts import Font, bucket, draw, find_fonts
from recipes.images.sources import KANA_FONTS, LATIN_FONTS
from smile_zoo.images import TASKS
from smile_zoo.images.tasks import animals, clothes, digits, planets, textures

log = logging.getLogger(__name__)

SIZE = 28
COUNTS = {"train": 3000, "validation": 300, "test": 600}
# interval of each split, on the width of an image or the order of the font packages
CUTS = {"train": (0.0, 0.6), "validation": (0.62, 0.72), "test": (0.74, 1.0)}
# packages with a lower bucket are for pretraining; the others are divided by CUTS
PRETRAINING_FONTS = 0.3
HIRAGANA = "あいうえおかきくけこさしすせそたちつてと"
FLAG_CODES = [
    "ar",
    "au",
    "br",
    "ca",
    "cl",
    "cn",
    "cu",
    "fi",
    "fr",
    "de",
    "gr",
    "in",
    "il",
    "it",
    "jm",
    "jp",
    "mx",
    "no",
    "za",
    "kr",
    "es",
    "se",
    "tr",
    "gb",
    "us",
]
TEXTURE_PATTERN = re.compile(
    r"tex_(?:buildings|nature|material|mattn)/(?:s_|wall_|c_)?(brick|carpet|concrete|dirt|grass|metal|rock|roof|wallpaper|wood)"
    r"l?s?(?:_se|_slabs|ceiling)?_?\d*[a-z]?\.(?:png|jpg)$"
)

Split = tuple[np.ndarray, np.ndarray]  # images (N, 28, 28) or (N, 28, 28, 3) uint8, labels (N,) int64
Images = dict[str, Split]

Image.MAX_IMAGE_PIXELS = None


def build_tasks(root: Path, names: Sequence[str] = TASKS) -> dict[str, Images]:
    """Build the splits of tasks from the unpacked packages below `root`; the result is deterministic."""
    builders: dict[str, Callable[[Path], Images]] = {
        "digits": _digits,
        "clothes": _clothes,
        "animals": _animals,
        "textures": _textures,
        "planets": _planets,
        "letters": lambda r: glyph_images(r, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", LATIN_FONTS, seed=6),
        "kana": lambda r: glyph_images(r, HIRAGANA, KANA_FONTS, seed=7),
        "flags": flag_images,
    }
    tasks = {}
    for name in names:
        tasks[name] = builders[name](root)
        log.info("%s: %s", name, {s: x.shape for s, (x, _) in tasks[name].items()})
    return tasks


def _random_splits(images: np.ndarray, labels: np.ndarray, seed: int) -> Images:
    """Divide independent samples at random."""
    order = np.random.default_rng(seed).permutation(len(labels))[: sum(COUNTS.values())]
    edges = np.cumsum(list(COUNTS.values()))[:-1]
    return {s: (images[i], labels[i]) for s, i in zip(COUNTS, np.split(order, edges), strict=True)}


def _digits(root: Path) -> Images:
    images, labels = [], []
    for label in range(len(digits.classnames)):
        raw = json.loads((root / f"mnist/package/src/digits/{label}.json").read_text())["data"]
        scans = np.asarray(raw, dtype=np.float32).reshape(-1, SIZE, SIZE)
        images.append((scans * (255 if scans.max() <= 1 else 1)).round().astype(np.uint8))
        labels += [label] * len(scans)
    return _random_splits(np.concatenate(images), np.asarray(labels), seed=1)


def _clothes(root: Path) -> Images:
    def read(stem: str, header: int) -> np.ndarray:
        file = next((root / "dataset-fashion-mnist").rglob(f"{stem}*"))
        raw = file.read_bytes()
        return np.frombuffer(gzip.decompress(raw) if file.suffix == ".gz" else raw, dtype=np.uint8)[header:]

    assert len(clothes.classnames) == 10
    images = read("train-images-idx3-ubyte", 16).reshape(-1, SIZE, SIZE)
    labels = read("train-labels-idx1-ubyte", 8).astype(np.int64)
    return _random_splits(images, labels, seed=2)


class _ArraysOnly(pickle.Unpickler):
    """Unpickler for the files of animal-shape-mnist that loads NumPy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "numpy" and name in {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"animal-shape-mnist: refusing to load {module}.{name}")


def _animals(root: Path) -> Images:
    def read(part: str) -> np.ndarray:
        file = next((root / "animal-shape-mnist").rglob(f"animal_{part}_version_3.gz"))
        with gzip.open(file) as stream:
            return np.asarray(_ArraysOnly(stream).load())

    images, labels = read("data"), read("label")
    names = sorted(np.unique(labels).tolist())
    assert len(names) == len(animals.classnames), names
    images = images.reshape(-1, SIZE, SIZE)
    if images.max() <= 1:
        images = images * 255
    return _random_splits(images.astype(np.uint8), np.searchsorted(names, labels.reshape(-1)), seed=3)


def random_crops(
    sources: Mapping[int, Sequence[Image.Image]], window: tuple[int, int], seed: int, turn: bool, size: int = SIZE
) -> Images:
    """Crop labelled images at random; each split is restricted to a vertical band of every image.

    Args:
        sources: images of each label.
        window: smallest and largest side of a crop, in pixels.
        seed: of the random crops.
        turn: rotate each crop by a random multiple of 90 degrees.
        size: of the images, in pixels.
    """
    splits = {}
    for split, (low, high) in CUTS.items():
        rng = np.random.default_rng([seed, list(CUTS).index(split)])
        images, labels = [], []
        for index in range(COUNTS[split]):
            label = index % len(sources)
            image = sources[label][int(rng.integers(len(sources[label])))]
            start, end = round(low * image.width), round(high * image.width)
            largest = min(window[1], end - start, image.height)
            side = int(rng.integers(min(window[0], largest), largest + 1))
            left = int(rng.integers(start, end - side + 1))
            top = int(rng.integers(0, image.height - side + 1))
            crop = image.crop((left, top, left + side, top + side)).resize(
                (size, size), Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
            )
            if turn:
                crop = crop.rotate(90 * int(rng.integers(4)))
            images.append(np.asarray(crop))
            labels.append(label)
        splits[split] = (np.stack(images), np.asarray(labels))
    return splits


def read_textures(root: Path) -> dict[str, list[Image.Image]]:
    """Read the texture images of each material; the longest side is at most 256 pixels."""
    by_material: dict[str, list[Image.Image]] = {name: [] for name in textures.classnames}
    with zipfile.ZipFile(next((root / "ufoai-textures").rglob("0textures.pk3"))) as pack:
        for name in sorted(pack.namelist()):
            match = TEXTURE_PATTERN.search(name)
            if match:
                image = Image.open(BytesIO(pack.read(name))).convert("RGB")
                image.thumbnail((256, 256))
                if min(image.size) >= 96:
                    by_material[match.group(1)].append(image)
    return by_material


def _textures(root: Path) -> Images:
    sources = read_textures(root)
    log.info("textures: %s", {k: len(v) for k, v in sources.items()})
    return random_crops({i: sources[n] for i, n in enumerate(textures.classnames)}, (40, 66), seed=4, turn=True)


def read_planets(root: Path) -> dict[str, Image.Image]:
    """Read the surface maps of planets and moons, 512×256 pixels."""
    folder = next((root / "stellarium-data").rglob("textures"))
    files = {"earth": "earth_cmap"}
    return {
        name: Image.open(folder / f"{files.get(name, name)}.png")
        .convert("RGB")
        .resize((512, 256), Image.Resampling.BOX)
        for name in planets.classnames
    }


def _planets(root: Path) -> Images:
    sources = read_planets(root)
    # a cylindrical map distorts the poles: they are cut off
    bands = {i: [sources[n].crop((0, 32, 512, 224))] for i, n in enumerate(planets.classnames)}
    return random_crops(bands, (28, 50), seed=5, turn=False)


def jitter_glyph(mask: np.ndarray, rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """Rotate, scale and shift a glyph (CANVAS, CANVAS) slightly: an image of size×size pixels, mode L."""
    image = Image.fromarray(mask).rotate(float(rng.normal(0, 6)), resample=Image.Resampling.BICUBIC)
    side = float(rng.uniform(72, 92))
    left = (image.width - side) / 2 + float(rng.uniform(-5, 5))
    top = (image.height - side) / 2 + float(rng.uniform(-5, 5))
    return image.resize((size, size), Image.Resampling.BOX, box=_clip_box((left, top, left + side, top + side), image))


def _clip_box(box: tuple[float, float, float, float], image: Image.Image) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    return max(0.0, left), max(0.0, top), min(float(image.width), right), min(float(image.height), bottom)


def pretraining_fonts(root: Path, packages: list[str], characters: str) -> list[Font]:
    """Find the fonts of the packages that are reserved for pretraining."""
    return [f for f in find_fonts(root, packages, characters) if bucket(f.package) < PRETRAINING_FONTS]


def glyph_images(root: Path, characters: str, packages: list[str], seed: int, size: int = SIZE) -> Images:
    """Draw characters in the fonts of packages; each split has fonts of its own.

    Args:
        root: folder of the unpacked packages.
        characters: one for each class.
        packages: packages with fonts.
        seed: of the choice of fonts and the jitter.
        size: of the images, in pixels.
    """
    fonts = [f for f in find_fonts(root, packages, characters) if bucket(f.package) >= PRETRAINING_FONTS]
    families = sorted({f.package for f in fonts}, key=bucket)
    place = {package: index / len(families) for index, package in enumerate(families)}
    splits = {}
    for split, (low, high) in CUTS.items():
        split_fonts = [f for f in fonts if low <= place[f.package] < high]
        log.info("glyphs of %d classes, %s: %d fonts", len(characters), split, len(split_fonts))
        masks = {(f, c): mask for f in split_fonts for c in characters if (mask := draw(f, c)) is not None}
        rng = np.random.default_rng([seed, list(CUTS).index(split)])
        images, labels = [], []
        for index in range(COUNTS[split]):
            label = index % len(characters)
            mask = masks[split_fonts[rng.integers(len(split_fonts))], characters[label]]
            ink = np.asarray(jitter_glyph(mask, rng, size), dtype=np.float32) / 255
            paper, pen = rng.uniform(170, 255), rng.uniform(0, 80)
            noise = rng.normal(0, 6, ink.shape)
            images.append(np.clip(paper + (pen - paper) * ink + noise, 0, 255).astype(np.uint8))
            labels.append(label)
        splits[split] = (np.stack(images), np.asarray(labels))
    return splits


def read_photographs(root: Path) -> list[Image.Image]:
    """Read the wallpapers of KDE and Lomiri, scaled to a height of 320 pixels."""
    files = sorted((root / "plasma-workspace-wallpapers").rglob("screenshot.*"))
    for package in ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04"):
        files += sorted(
            p for p in (root / package).rglob("*") if p.suffix.lower() in {".jpg", ".png"} and not p.is_symlink()
        )
    photographs = []
    for file in files:
        image = Image.open(file).convert("RGB")
        if min(image.size) >= 200:
            photographs.append(image.resize((round(image.width * 320 / image.height), 320), Image.Resampling.BOX))
    return photographs


def warp(picture: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
    """Transform a picture by a random perspective, onto a transparent square of `size` pixels (mode RGBA)."""
    canvas = picture.convert("RGBA")
    w, h = canvas.size
    scale = rng.uniform(0.62, 0.95) * size / w
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * [w * scale, h * scale]
    corners += rng.normal(0, 0.06 * size, (4, 2))
    corners += (size - corners.max(0) - corners.min(0)) / 2 + rng.uniform(-0.08, 0.08, 2) * size
    source = np.array([[0, 0], [w, 0], [w, h], [0, h]])
    rows = []
    for (x, y), (u, v) in zip(corners, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    coefficients = np.linalg.solve(np.array(rows), source.reshape(-1))
    return canvas.transform((size, size), Image.Transform.PERSPECTIVE, coefficients.tolist(), Image.Resampling.BILINEAR)


def flag_images(root: Path, codes: Sequence[str] = FLAG_CODES, size: int = SIZE) -> Images:
    """Paste flags onto photographs, in perspective; each split has photographs of its own.

    Args:
        root: folder of the unpacked packages.
        codes: of the countries, one for each class.
        size: of the images, in pixels.
    """
    folder = next((root / "iso-flags-png-320x240").rglob("ar.png")).parent
    pictures = [Image.open(folder / f"{code}.png").convert("RGBA") for code in codes]
    photographs = read_photographs(root)
    splits = {}
    for split, (low, high) in CUTS.items():
        backgrounds = photographs[int(low * len(photographs)) : int(high * len(photographs))]
        rng = np.random.default_rng([8, list(CUTS).index(split)])
        images, labels = [], []
        for index in range(COUNTS[split]):
            label = index % len(pictures)
            photograph = backgrounds[rng.integers(len(backgrounds))]
            side = int(rng.integers(120, min(photograph.size)))
            left, top = (int(rng.integers(extent - side + 1)) for extent in photograph.size)
            scene = photograph.crop((left, top, left + side, top + side)).resize((112, 112))
            flag = warp(pictures[label], rng, 112)
            scene.paste(flag, (0, 0), flag)
            scene = scene.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2.5))))
            shade = rng.uniform(0.55, 1.1)
            array = np.asarray(scene.resize((size, size), Image.Resampling.BOX), dtype=np.float32) * shade
            images.append(np.clip(array + rng.normal(0, 5, array.shape), 0, 255).astype(np.uint8))
            labels.append(label)
        splits[split] = (np.stack(images), np.asarray(labels))
    return splits
