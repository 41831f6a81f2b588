"""Names: experts with hostile names, in arguments and in edited checkpoints, must not be written elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from torch import nn

from fusion_bench_smile import (
    add_expert,
    export_adapters,
    load,
    metadata_of,
    save,
    upscale,
    upscale_to_folder,
)
from studies.reliability.models import (
    EXPERTS,
    RANKS,
    fine_tuned,
    perceptron,
    upscaled_perceptron,
    upscaled_tower,
    vision_tower,
)
from studies.reliability.mutations import CONFIG, INDEX, METADATA, SECTION
from studies.reliability.outcomes import Outcome, check, combined, judge, other
from studies.reliability.runner import Case, Part, Trial
from studies.reliability.targets import SHARD

VICTIM = "victim"  # a folder beside that of an attempt, with weights of its own
# {outside} stands for the absolute path of the folder around that of the attempt
NAMES = (
    "../victim", "../../victim", "./../victim", "first/../../victim", "{outside}/victim", "{outside}/new", "/", "",
    ".", "..", "...", " ", "\t", "\n", "a\nb", "a\rb", "a\0b", "\0", "a/b", "a\\b", "..\\victim", "C:\\victim", "a/",
    "/a", "~", "~/victim", "$HOME", "%2e%2e%2fvictim", "．．／victim", "‥", "∕victim", "x" * 200, "x" * 201, "x" * 300,
    "é" * 100, "é" * 101, "\ud800", "a\udfffb", "\u202eabc", "\u200b", "\x7f", "\x85", "\u2028", "a b", " a", "a ",
    "-rf", "--help", "*", "?", "NUL", "con", "first", "second", "config.json", "adapter_model.safetensors", ".hidden",
    ".part", ".first.x.part", "<b>", "|", "`a`", "a.b", "🙂",
)  # fmt: skip
ALPHABET = ("..", ".", "/", "\\", "\0", "\n", "a", "b", " ", "victim", "~", "é", "\ud800", "\u2028", "x" * 100)


class Prepared:
    """Models, and their files."""

    def __init__(self, folder: Path) -> None:
        self.base, self.tower, self.perceptron = vision_tower(), upscaled_tower(), upscaled_perceptron()
        self.expert = fine_tuned(self.base, seed=9)
        self.pretrained_folder, self.expert_folder = folder / "pretrained", folder / "expert"
        self.base.save_pretrained(self.pretrained_folder, max_shard_size=SHARD)
        self.expert.save_pretrained(self.expert_folder, max_shard_size=SHARD)


def hostile_name(random: Random, outside: Path) -> str:
    """One of `NAMES`, or a random one."""
    if random.random() < 0.7:
        return random.choice(NAMES).replace("{outside}", str(outside))
    return "".join(random.choices(ALPHABET, k=random.randint(1, 5)))


def attempt(prepared: Prepared, case: Case, enter: Callable[..., Iterator[Path]]) -> Iterator[Outcome]:
    """Use a hostile name, and compare everything outside of the attempt's own folders before and after."""
    room, victim = case.folder / "room", case.folder / VICTIM
    for folder in (victim, room / VICTIM):
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"of a person")
    name, inside = hostile_name(case.random, case.folder), room / "inside"
    before = _tree(case.folder, inside)
    outcome = judge(lambda: list(enter(prepared, case.random, inside, name)), lambda paths: _inside(paths, inside))
    yield combined([outcome, check(_tree(case.folder, inside) == before, f"{name!r} changed something outside")])


def _tree(folder: Path, apart: Path) -> dict[str, bytes]:
    """Path → content of everything in a folder but one of its subfolders."""
    entries = [path for path in sorted(folder.rglob("*")) if apart not in (path, *path.parents)]
    return {str(path): path.read_bytes() if path.is_file() else b"folder" for path in entries}


def _inside(paths: list[Path], folder: Path) -> Outcome:
    """Right if each path is an entry of a subfolder, and nothing of another name was written."""
    for path in paths:
        if path.parent.parent != folder or not path.is_dir() or path.resolve() != path:
            return other(f"{str(path)!r} is not directly inside of its folder")
    found = {entry for path in paths for entry in path.parent.iterdir()}
    return check(found == set(paths), f"other entries: {[str(path) for path in found - set(paths)]}")


# -- where names enter. Each yields the folders of the adapters that were written


def by_upscale(prepared: Prepared, random: Random, folder: Path, name: str) -> Iterator[Path]:
    """An argument of `upscale`."""
    model = upscale(prepared.base, {name: prepared.expert, "other": fine_tuned(prepared.base, seed=8)}, **RANKS)
    yield from _saved_and_exported(model, folder, (name, "other"))


def by_upscale_to_folder(prepared: Prepared, random: Random, folder: Path, name: str) -> Iterator[Path]:
    """An argument of `upscale_to_folder`."""
    experts = {name: prepared.expert_folder, "other": prepared.expert_folder}
    upscale_to_folder(prepared.pretrained_folder, experts, folder / "checkpoint", **RANKS)
    yield from _exported(load(folder / "checkpoint"), folder, (name, "other"))


def by_add_expert(prepared: Prepared, random: Random, folder: Path, name: str) -> Iterator[Path]:
    """An argument of `add_expert`."""
    yield from _saved_and_exported(add_expert(prepared.tower, prepared.expert, name), folder, (*EXPERTS, name))


def by_checkpoint(prepared: Prepared, random: Random, folder: Path, name: str) -> Iterator[Path]:
    """The experts of a checkpoint whose config.json was edited."""
    save(prepared.tower, folder / "checkpoint")
    config = json.loads((folder / "checkpoint" / CONFIG).read_text())
    names = _rename(config[SECTION], random, name)
    (folder / "checkpoint" / CONFIG).write_text(json.dumps(config))
    yield from _exported(load(folder / "checkpoint"), folder, names)


def by_metadata(prepared: Prepared, random: Random, folder: Path, name: str) -> Iterator[Path]:
    """The experts of a checkpoint of another module whose smile.json was edited."""
    save(prepared.perceptron, folder / "checkpoint")
    section = json.loads((folder / "checkpoint" / METADATA).read_text())
    names = _rename(section, random, name)
    (folder / "checkpoint" / METADATA).write_text(json.dumps(section))
    yield from _exported(load(folder / "checkpoint", perceptron()), folder, names)


def by_index(prepared: Prepared, random: Random, folder: Path, name: str) -> Iterator[Path]:
    """A file that an index names, in another folder in half of the attempts."""
    path, elsewhere = folder / "expert", folder / "elsewhere"
    for copy in (path, elsewhere):
        shutil.copytree(prepared.expert_folder, copy)
    index = json.loads((path / INDEX).read_text())
    file = random.choice(sorted(set(index["weight_map"].values())))
    outside = random.choice(("../elsewhere", "../expert", f"{elsewhere}", ".", "../expert/../elsewhere")) + f"/{file}"
    changed = random.choice((name, outside))
    index["weight_map"] = {key: changed if value == file else value for key, value in index["weight_map"].items()}
    (path / INDEX).write_text(json.dumps(index))
    yield from _exported(upscale(prepared.base, {"first": path}, **RANKS), folder, ("first",))
    raise AssertionError(f"the index names {changed!r}, and was read")


def _rename(section: dict[str, Any], random: Random, name: str) -> tuple[str, ...]:
    """Rename one expert everywhere in a section; the new names."""
    old = random.choice(section["experts"])
    section["experts"] = [name if expert == old else expert for expert in section["experts"]]
    for key in ("sources", "changes"):
        entries = section["recipe"].get(key, {})
        section["recipe"][key] = {name if expert == old else expert: value for expert, value in entries.items()}
    return tuple(section["experts"])


def _saved_and_exported(model: nn.Module, folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    save(model, folder / "checkpoint")
    yield from _exported(load(folder / "checkpoint"), folder, names)


def _exported(model: nn.Module, folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """Export the adapters of a model, whose experts must have these names."""
    if metadata_of(model).experts != names or len(set(names)) < len(names):
        raise AssertionError(f"the experts are {metadata_of(model).experts}, not {names}")
    yield from export_adapters(model, folder / "adapters").values()


ENTRIES: dict[str, tuple[Callable[..., Iterator[Path]], int]] = {
    "upscale": (by_upscale, 150), "upscale_to_folder": (by_upscale_to_folder, 100), "add_expert": (by_add_expert, 100),
    "edited config.json": (by_checkpoint, 200), "edited smile.json": (by_metadata, 200),
    "edited index": (by_index, 100),
}  # fmt: skip
PART = Part(
    "names", Prepared, {name: Trial(partial(attempt, enter=enter), count) for name, (enter, count) in ENTRIES.items()}
)
