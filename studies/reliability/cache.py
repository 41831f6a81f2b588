"""The factor cache: whatever is in its folder, upscaling gives the model that it gives without a cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from fusion_bench_smile import FactorCache, upscale
from studies.reliability.children import Child
from studies.reliability.damage import damaged_json, flipped, joined_safetensors, split_safetensors, truncated
from studies.reliability.models import fine_tuned, identity
from studies.reliability.outcomes import Outcome, check, judge
from studies.reliability.runner import Case, Part, Trial

# LAPACK factors the first layer, block Krylov the second one; its last bits depend on the rank that it seeks
SIDES = (40, 60, 560)
OPTIONS: tuple[dict[str, Any], ...] = (
    {"gate_k": 2, "k": 4}, {"gate_k": 2, "k": 8, "routing_use_diff": False}, {"gate_k": 2, "k": 32},
    {"gate_k": 2, "k": 36}, {"gate_k": 4, "k": 38},
)  # fmt: skip
UPSCALINGS = 3  # while another process deletes entries, or with one cache


class Prepared:
    """A model, its experts, and for each of `OPTIONS` a cache and the identity of the model without one."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        sides = (*pairwise(SIDES), (SIDES[-1], SIDES[-1]))
        self.base = nn.Sequential(*(nn.Linear(before, after, bias=False) for before, after in sides))
        self.experts = {name: fine_tuned(self.base, seed) for name, seed in (("first", 1), ("second", 2))}
        self.expected = [identity(upscale(self.base, self.experts, **options)) for options in OPTIONS]
        self.caches = [folder / f"cache-{number}" for number in range(len(OPTIONS))]
        for number, path in enumerate(self.caches):
            self.build(number, path)

    def build(self, number: int, path: Path, **bound: int) -> nn.Module:
        """The model of one of `OPTIONS`, with a cache."""
        return upscale(self.base, self.experts, factor_cache=FactorCache(path, **bound), **OPTIONS[number])

    def examine(self, number: int, path: Path, **bound: int) -> Outcome:
        """Right if the cache makes no difference."""
        return judge(
            lambda: self.build(number, path, **bound),
            lambda model: check(identity(model) == self.expected[number], f"another model for {OPTIONS[number]}"),
        )


def damaged_entries(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """Some entries are damaged, or have the names of others. They are used twice."""
    number, path = case.random.randrange(len(OPTIONS)), case.folder / "cache"
    shutil.copytree(prepared.caches[number], path)
    entries = sorted(path.iterdir())
    for entry in case.random.sample(entries, case.random.randint(1, len(entries))):
        case.random.choice(DAMAGES)(case.random, entry)
    for _ in range(2):
        yield prepared.examine(number, path)


def exchanged_entries(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """Entries have the names of others, of the same cache or of one for other ranks."""
    number, other = case.random.choices(range(len(OPTIONS)), k=2)
    path, source = case.folder / "cache", prepared.caches[other]
    shutil.copytree(prepared.caches[number], path)
    names, contents = sorted(path.iterdir()), [file.read_bytes() for file in sorted(source.iterdir())]
    for name in names:
        name.write_bytes(case.random.choice(contents))
    yield prepared.examine(number, path)


def other_ranks_first(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """Options one after the other with one cache, in any order."""
    for number in case.random.choices(range(len(OPTIONS)), k=UPSCALINGS):
        yield prepared.examine(number, case.folder / "cache")


def eviction(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """Another process deletes entries while they are used, or there is room for few."""
    number, path = case.random.randrange(len(OPTIONS)), case.folder / "cache"
    bound = {"max_bytes": 200_000} if case.random.random() < 0.5 else {}
    shutil.copytree(prepared.caches[number], path)
    deleting = Child(lambda send: _delete_for_ever(case.random, path))
    for _ in range(UPSCALINGS):
        yield prepared.examine(number, path, **bound)
    yield check(deleting.end() < 0, "the deleting process failed")


def _delete_for_ever(random: Random, path: Path) -> None:
    while True:
        for file in path.glob("*.safetensors"):
            if random.random() < 0.3:
                file.unlink(missing_ok=True)


def _flip_anywhere(random: Random, entry: Path) -> None:
    entry.write_bytes(flipped(random, entry.read_bytes()))


def _flip_in_header(random: Random, entry: Path) -> None:
    content = entry.read_bytes()
    entry.write_bytes(flipped(random, content, end=8 + int.from_bytes(content[:8], "little"), most=1))


def _change_header(random: Random, entry: Path) -> None:
    header, data = split_safetensors(entry.read_bytes())
    entry.write_bytes(joined_safetensors(damaged_json(random, header), data))


def _truncate(random: Random, entry: Path) -> None:
    entry.write_bytes(truncated(random, entry.read_bytes()))


def _empty(random: Random, entry: Path) -> None:
    entry.write_bytes(b"")


def _put_folder(random: Random, entry: Path) -> None:
    entry.unlink()
    entry.mkdir()


DAMAGES: tuple[Callable[[Random, Path], None], ...] = (
    _flip_anywhere, _flip_anywhere, _flip_in_header, _flip_in_header, _change_header, _change_header, _truncate,
    _empty, _put_folder,
)  # fmt: skip
PART = Part("cache", Prepared, {
    "damaged entries": Trial(damaged_entries, 100), "exchanged entries": Trial(exchanged_entries, 60),
    "other ranks first": Trial(other_ranks_first, 60), "eviction by another process": Trial(eviction, 60),
})  # fmt: skip
