"""Targets: everything that the library writes and replaces, with several versions of each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash
from torch import nn

from fusion_bench_smile import FactorCache, export_adapters, load, metadata_of, save, upscale, upscale_to_folder
from studies.reliability.models import (
    RANKS,
    experts_of,
    fine_tuned,
    identity,
    is_of_transformers,
    perceptron,
    routed_tower,
    upscaled_perceptron,
    upscaled_tower,
    vision_tower,
)
from studies.reliability.outcomes import Outcome, check

SHARD = "24KB"  # about five shards of a tower
NUM_VERSIONS = 3
COMPANION = "notes.txt"  # a file of a person, which is carried along


@dataclass(frozen=True)
class Target:
    """Something that is written as a whole, part by part: a folder that holds a checkpoint, adapters, a report.

    Attributes:
        write: Writes a version to a path.
        read: What each complete part at a path is. A part that is absent is left out.
        versions: What `read` returns for each version.
        carries: The folder keeps files of a person when it is replaced.
        sample: A folder with version 0.
    """

    write: Callable[[Path, int], object]
    read: Callable[[Path], Mapping[str, str]]
    versions: Sequence[Mapping[str, str]]
    carries: bool = False
    sample: Path | None = None

    def begin(self, path: Path) -> None:
        """Put version 0 at a path."""
        if self.sample is None:
            self.write(path, 0)
        else:
            shutil.copytree(self.sample, path)

    def examine(self, path: Path, versions: Sequence[int], may_be_absent: bool = False) -> Outcome:
        """Right if each part at a path is that of one of some versions."""
        found = self.read(path)
        for part, value in found.items():
            if value not in {self.versions[version].get(part) for version in versions}:
                return check(False, f"{part} is none of the versions that were written")
        missing = [part for part in self.versions[0] if part not in found]
        return check(may_be_absent or not missing, f"{missing} are absent")


def sampled(targets: Mapping[str, Target], folder: Path) -> dict[str, Target]:
    """Targets with samples, written into a folder, so that the attempts need not write them."""
    for name, target in targets.items():
        if target.sample is None:
            target.write(folder / "samples" / name, 0)
    return {
        name: replace(target, sample=target.sample or folder / "samples" / name) for name, target in targets.items()
    }


def leftovers(folder: Path) -> Outcome:
    """Right if a folder and its subfolders hold no temporary entry."""
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith((".", "tmp"))]
    return check(not found, f"temporary entries stay: {found}")


def checkpoint_targets(folder: Path) -> dict[str, Target]:
    """Checkpoints by `save` and `upscale_to_folder`."""
    towers = [upscaled_tower(version) for version in range(NUM_VERSIONS)]
    ranks = [upscaled_tower(version, k=3 + 4 * version) for version in range(NUM_VERSIONS)]
    routed = [routed_tower(version) for version in range(NUM_VERSIONS)]
    others = [upscaled_perceptron(version) for version in range(NUM_VERSIONS)]
    return {
        "save, shards": _saved(towers, max_shard_size=SHARD),
        "save, other numbers of shards": _saved(ranks, max_shard_size=SHARD),
        "save, router for whole inputs": _saved(routed),
        "save, not of transformers": _saved(others),
        "upscale_to_folder": _streamed(folder, towers),
    }


def all_targets(folder: Path) -> dict[str, Target]:
    """Checkpoints, adapters and the factor cache."""
    return {
        **checkpoint_targets(folder),
        "export_adapters": _exported(folder, [upscaled_tower(version) for version in range(NUM_VERSIONS)]),
        "FactorCache": _cached(),
    }


def _saved(models: Sequence[nn.Module], **options: str) -> Target:
    base = None if is_of_transformers(models[0]) else perceptron()

    def read(path: Path) -> dict[str, str]:
        return {"checkpoint": identity(load(path, base))} if path.exists() else {}

    return Target(
        lambda path, version: save(models[version], path, **options), read,
        [{"checkpoint": identity(model)} for model in models], carries=True,
    )  # fmt: skip


def _streamed(folder: Path, models: Sequence[nn.Module]) -> Target:
    base = vision_tower()
    base.save_pretrained(folder / "pretrained")
    for version in range(len(models)):
        for name, expert in experts_of(base, version).items():
            expert.save_pretrained(folder / f"{name}-{version}")

    def write(path: Path, version: int) -> None:
        experts = {name: folder / f"{name}-{version}" for name in metadata_of(models[version]).experts}
        upscale_to_folder(folder / "pretrained", experts, path, max_shard_bytes=24_000, **RANKS)

    return Target(write, _saved(models).read, [{"checkpoint": identity(model)} for model in models], carries=True)


def _exported(folder: Path, models: Sequence[nn.Module]) -> Target:
    def read(path: Path) -> dict[str, str]:
        return {entry.name: folder_digest(entry) for entry in _folders(path)}

    versions = []
    for version, model in enumerate(models):
        export_adapters(model, folder / f"adapters-{version}")
        versions.append(read(folder / f"adapters-{version}"))
    return Target(lambda path, version: export_adapters(models[version], path), read, versions)


def _cached() -> Target:
    """The factor cache: whatever it holds, upscaling gives the same model."""
    base, expert = perceptron(), fine_tuned(perceptron(), seed=1)
    ranks = [4, 8, 12]

    def build(path: Path, version: int) -> nn.Module:
        return upscale(base, {"first": expert}, gate_k=2, k=ranks[version], factor_cache=FactorCache(path))

    def read(path: Path) -> dict[str, str]:
        return {f"k={k}": identity(build(path, version)) for version, k in enumerate(ranks)}

    models = [upscale(base, {"first": expert}, gate_k=2, k=k) for k in ranks]
    expected = {f"k={k}": identity(model) for k, model in zip(ranks, models, strict=True)}
    return Target(build, read, [expected] * len(ranks))


def folder_digest(folder: Path) -> str:
    """A digest of the names and contents of all files in a folder."""
    content = xxhash.xxh3_128()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content.update(f"{file.relative_to(folder)}\n".encode(errors="surrogateescape") + file.read_bytes())
    return content.hexdigest()


def _folders(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (Path(entry.path) for entry in os.scandir(path) if entry.is_dir() and entry.name[0] != ".")
