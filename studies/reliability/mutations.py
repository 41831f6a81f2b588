"""Mutations: files of checkpoints, experts and adapters are damaged at random and read."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from fusion_bench_smile import export_adapters, load, save, upscale, verify_checkpoint
from fusion_bench_smile.nn import routed_layers
from studies.reliability.damage import (
    damaged_json,
    damaged_text,
    flipped,
    joined_safetensors,
    split_safetensors,
    truncated,
)
from studies.reliability.models import (
    RANKS,
    experts_of,
    identity,
    perceptron,
    routed_tower,
    same_tensors,
    upscaled_language_model,
    upscaled_perceptron,
    upscaled_tower,
    vision_tower,
)
from studies.reliability.outcomes import RIGHT, Outcome, check, judge
from studies.reliability.runner import Case, Part, Trial
from studies.reliability.targets import SHARD

SECTION, CONFIG, METADATA, DIGESTS = "quantization_config", "config.json", "smile.json", "smile_digests.json"
INDEX, ADAPTER = "model.safetensors.index.json", "adapter_config.json"
SECONDS = 30.0  # an attempt takes less than one
TEXT_SHARE = 0.15  # of attempts that change bytes of a JSON file instead of its values
VERIFY_SHARE = 0.3
TOLERANCE = 1e-4
DELTA_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save")
# options that every layer repeats under these names, with values of which not all are valid
REPEATED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "top_k": ("top_k", (0, 1, 2, 3, -1, 1.5, 10**9, "1", True)),
    "execution": ("execution", ("grouped", "masked", "merged", "fast", "", None)),
    "storage": ("storage", ("int8", "same", "int4")),
    "routing_use_diff": ("shared_router", (True, False, 1)),
}
SINGLE: dict[str, tuple[Any, ...]] = {
    "routing_scope": ("token", "input", "two_pass", "layer"), "gate_k": (1, 2, 64, 0, None), "k": (1, 64, -1),
    "average_experts": (True, False), "byte_ratio": (1.5, 0.5, None), "param_ratio": (1.5, 0.5, None),
    "refuse_unknown": (True, False), "convolutions": (True,),
    "target_modules": (["q_proj"], "(a+)+$", None), "device": ("cuda:7", "tpu", "auto"),
}  # fmt: skip


@dataclass
class Prepared:
    """Folders with undamaged files, and the models in them."""

    checkpoints: dict[str, tuple[Path, nn.Module]]  # of transformers, by name
    perceptron: tuple[Path, nn.Module]
    adapter: Path
    expert: Path
    base: nn.Module
    other_expert: nn.Module
    expected: dict[str, str]  # "adapter" or "expert" → the identity of the model that is upscaled with it


def prepare(folder: Path) -> Prepared:
    """Write checkpoints, an adapter and an expert."""
    models = {
        "tower": upscaled_tower(), "shards": upscaled_tower(), "routed": routed_tower(),
        "language": upscaled_language_model(),
    }  # fmt: skip
    checkpoints = {name: (folder / name, model) for name, model in models.items()}
    for name, (path, model) in checkpoints.items():
        save(model, path, max_shard_size=SHARD if name == "shards" else "1GB")
    save(upscaled_tower(version=1), folder / "other shards", max_shard_size=SHARD)
    save(upscaled_perceptron(), folder / "perceptron")
    adapter = export_adapters(upscaled_tower(), folder / "adapters")["first"]
    base = vision_tower()
    experts = experts_of(base)
    experts["first"].save_pretrained(folder / "expert", max_shard_size=SHARD)
    prepared = Prepared(
        checkpoints, (folder / "perceptron", upscaled_perceptron()), adapter, folder / "expert", base,
        experts["second"], {},
    )  # fmt: skip
    prepared.expected = {
        "adapter": identity(_upscaled(prepared, adapter)),
        "expert": identity(_upscaled(prepared, prepared.expert)),
    }
    return prepared


def _upscaled(prepared: Prepared, expert: Path | Mapping[str, Tensor]) -> nn.Module:
    return upscale(prepared.base, {"first": expert, "second": prepared.other_expert}, **RANKS)


# -- checkpoints


def section(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """The SMILE section of config.json."""
    source, model = prepared.checkpoints[case.random.choice(("tower", "routed", "language"))]
    path = _copy(source, case)
    _damage_file(case.random, path / CONFIG, root=(SECTION,))
    yield _load(path, model, case.random.random() < VERIFY_SHARE)


def options(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """An option of the section, changed everywhere as a person would do it, valid or not."""
    source, model = prepared.checkpoints[case.random.choice(("tower", "routed", "language"))]
    path = _copy(source, case)
    config = json.loads((path / CONFIG).read_text())
    for name in case.random.sample([*REPEATED, *SINGLE], case.random.choice((1, 1, 2))):
        repeated, values = REPEATED.get(name, ("", SINGLE.get(name, ())))
        value = case.random.choice(values)
        config[SECTION]["options"][name] = value
        for layer in config[SECTION]["layers"].values() if repeated else ():
            layer[repeated] = value
    (path / CONFIG).write_text(json.dumps(config))
    yield _load(path, model, verify=False)


def rest_of_config(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """The values of config.json that belong to transformers."""
    source, model = prepared.checkpoints[case.random.choice(("tower", "routed", "language"))]
    path = _copy(source, case)
    _damage_file(case.random, path / CONFIG, spared=(SECTION,))
    yield judge(lambda: load(path), lambda loaded: check(same_tensors(loaded, model), "another model"))


def index(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """The index of a sharded checkpoint."""
    source, model = prepared.checkpoints["shards"]
    path = _copy(source, case)
    _damage_file(case.random, path / INDEX)
    yield _load(path, model, case.random.random() < VERIFY_SHARE)


def metadata(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """smile.json, the section of other modules."""
    source, model = prepared.perceptron
    path = _copy(source, case)
    _damage_file(case.random, path / METADATA)
    yield _load(path, model, case.random.random() < VERIFY_SHARE, perceptron())


def digests(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """The digests, which must not hide anything: a tensor is damaged as well in half of the attempts."""
    source, model = prepared.checkpoints[case.random.choice(("tower", "shards"))]
    path = _copy(source, case)
    _damage_file(case.random, path / DIGESTS)
    damaged = case.random.random() < 0.5
    if damaged:
        _damage_data(case.random, path)
    if damaged or case.random.random() < 0.5:
        yield _load(path, model, verify=True)
    else:
        yield judge(lambda: verify_checkpoint(path), lambda count: check(count == _count(path), "too few tensors"))


def weights(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """The safetensors files of a checkpoint: headers, data, shards of another model; loaded with their digests."""
    source, model = prepared.checkpoints[case.random.choice(("tower", "shards", "routed", "language"))]
    path = _copy(source, case)
    case.random.choice((_damage_data, _damage_data, _damage_header, _damage_weights))(case.random, path)
    yield _load(path, model, verify=True)


def mixed_shards(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """Some shards are those of another model with the same names, shapes and options."""
    source, model = prepared.checkpoints["shards"]
    path, other = _copy(source, case), source.parent / "other shards"
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    for name in case.random.sample(shards, case.random.randrange(1, len(shards))):
        shutil.copyfile(other / name, path / name)
    yield judge(lambda: load(path, verify=True), lambda loaded: check(same_tensors(loaded, model), "a mixture"))


def _load(path: Path, model: nn.Module, verify: bool, pretrained: nn.Module | None = None) -> Outcome:
    """The outcome of loading: the tensors must be those of `model`, and the loaded model must work.

    What was saved with digests must be the section, too, if they are verified.
    """

    def examine(loaded: nn.Module) -> Outcome:
        if not same_tensors(loaded, model):
            return check(False, "other tensors or experts")
        if verify and identity(loaded) != identity(model):
            return check(False, "changed metadata passed verification")
        return judge(lambda: _output(loaded), lambda output: check(bool(output.isfinite().all()), "no finite output"))

    return judge(lambda: load(path, pretrained, verify=verify), examine)


@torch.no_grad()
def _output(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    name = getattr(model, "main_input_name", "")
    dtype = next(model.parameters()).dtype
    if name == "pixel_values":
        return model(torch.randn(2, 3, 28, 28, generator=generator).to(dtype)).last_hidden_state
    if name == "input_ids":
        return model(torch.randint(0, 40, (2, 5), generator=generator)).logits
    return model(torch.randn(4, 20, generator=generator).to(dtype))


# -- experts


def adapter_settings(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """The settings of a LoRA adapter."""
    path = _copy(prepared.adapter, case)
    _damage_file(case.random, path / ADAPTER)
    yield _upscale_adapter(prepared, path)


def adapter_weights(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """The header of an adapter's weights; nothing is stored that would show changed data."""
    path = _copy(prepared.adapter, case)
    case.random.choice((_damage_header, _damage_weights))(case.random, path)
    yield _upscale_adapter(prepared, path)


def experts(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """The index and the headers of a fine-tuned model."""
    path = _copy(prepared.expert, case)
    kind = case.random.choice(("index", "header", "weights"))
    if kind == "index":
        _damage_file(case.random, path / INDEX)
    else:
        {"header": _damage_header, "weights": _damage_weights}[kind](case.random, path)
    yield judge(lambda: _upscaled(prepared, path), lambda model: _examine_expert(prepared, path, model))


def _examine_expert(prepared: Prepared, path: Path, model: nn.Module) -> Outcome:
    """Right if the files are those of a whole model, which safetensors reads in the same way."""
    if identity(model) == prepared.expected["expert"]:
        return RIGHT
    state = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    state = {name: tensor for name, tensor in state.items() if name in prepared.base.state_dict()}
    same = judge(lambda: _upscaled(prepared, state), lambda other: check(identity(other) == identity(model), "differs"))
    return check(same == RIGHT, f"another model than the files hold: {same.detail}")


def _upscale_adapter(prepared: Prepared, path: Path) -> Outcome:
    """Upscale with a damaged adapter. Right if nothing changed, or PEFT reads the adapter in the same way."""

    def examine(model: nn.Module) -> Outcome:
        if identity(model) == prepared.expected["adapter"]:
            return RIGHT
        merged = _merged_by_peft(prepared, path)
        alone = upscale(prepared.base, {"first": path}, **RANKS)
        return check(_largest_difference(alone, merged) <= TOLERANCE, "another model than PEFT's")

    return judge(lambda: _upscaled(prepared, path), examine)


def _merged_by_peft(prepared: Prepared, path: Path) -> Mapping[str, Tensor]:
    """The weights that PEFT merges.

    Where it cannot read the damaged settings, it gets the undamaged ones but for those that deltas depend on.
    """
    try:
        return PeftModel.from_pretrained(copy.deepcopy(prepared.base), str(path)).merge_and_unload().state_dict()
    except Exception:
        damaged, settings = (json.loads((folder / ADAPTER).read_text()) for folder in (path, prepared.adapter))
        kept = {key: value for key, value in settings.items() if key not in DELTA_SETTINGS}
        kept |= {key: value for key, value in damaged.items() if key in DELTA_SETTINGS}
        (path / ADAPTER).write_text(json.dumps(kept))
    return PeftModel.from_pretrained(copy.deepcopy(prepared.base), str(path)).merge_and_unload().state_dict()


@torch.no_grad()
def _largest_difference(alone: nn.Module, merged: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a layer's weight, with its only expert, from the merged one."""
    largest = 0.0
    for name, layer in routed_layers(alone).items():
        down, up = layer.directions(0), layer.rows("up", 0)
        weight = cast(Tensor, layer.weight) + (up.mT @ down if down is not None and up is not None else 0)
        largest = max(largest, float((weight - merged[f"{name}.weight"]).norm() / weight.norm()))
    return largest


# -- files


def _copy(source: Path, case: Case) -> Path:
    return Path(shutil.copytree(source, case.folder / "model"))


def _count(path: Path) -> int:
    return sum(len(load_file(file)) for file in path.glob("*.safetensors"))


def _damage_file(random: Random, file: Path, root: tuple[str, ...] = (), spared: tuple[str, ...] = ()) -> None:
    if random.random() < TEXT_SHARE:
        file.write_bytes(damaged_text(random, file.read_bytes()))
    else:
        file.write_bytes(damaged_json(random, json.loads(file.read_text()), root, spared))


def _weights_file(random: Random, path: Path) -> Path:
    return random.choice(sorted(path.glob("*.safetensors")))


def _damage_data(random: Random, path: Path) -> None:
    file = _weights_file(random, path)
    content = file.read_bytes()
    file.write_bytes(flipped(random, content, start=8 + int.from_bytes(content[:8], "little")))


def _damage_header(random: Random, path: Path) -> None:
    """Change the JSON values of a header, or its bytes."""
    file = _weights_file(random, path)
    content = file.read_bytes()
    header, data = split_safetensors(content)
    if random.random() < 0.5:
        file.write_bytes(joined_safetensors(damaged_json(random, header), data))
    else:
        file.write_bytes(flipped(random, content, end=len(content) - len(data)))


def _damage_weights(random: Random, path: Path) -> None:
    """Cut off the end of a file, delete it, or put a folder or nothing in its place."""
    file = _weights_file(random, path)
    kind = random.choice(("truncate", "truncate", "truncate", "delete", "folder", "empty"))
    content = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind != "delete":
        file.write_bytes(truncated(random, content) if kind == "truncate" else b"")


COUNTS: dict[str, tuple[Callable[[Prepared, Case], Iterator[Outcome]], int]] = {
    "SMILE section of config.json": (section, 2000), "options, changed everywhere": (options, 600),
    "rest of config.json": (rest_of_config, 1000), "index of shards": (index, 600), "smile.json": (metadata, 1000),
    "smile_digests.json": (digests, 600), "weights, with digests": (weights, 1000), "mixed shards": (mixed_shards, 100),
    "adapter_config.json": (adapter_settings, 800), "weights of adapters": (adapter_weights, 400),
    "weights of experts": (experts, 400),
}  # fmt: skip
PART = Part("mutations", prepare, {name: Trial(attempt, count, SECONDS) for name, (attempt, count) in COUNTS.items()})
