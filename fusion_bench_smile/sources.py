"""Where a model's tensors come from: memory, safetensors files, a PEFT adapter. Read one at a time, never modified."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import PlanError

Shapes = Mapping[str, tuple[int, ...]]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
MAPPED_BYTES = 16 * 2**20  # read through one memory map
# options of a LoRA adapter that make it compute something else than (W + scaling·BA)x
UNREADABLE = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "layer_replication",
    "megatron_config",
    "target_parameters",
    "trainable_token_indices",
    "arrow_config",
)


class Source(Protocol):
    """One model's tensors by their state-dict names."""

    def shapes(self) -> Shapes:
        """Name and shape of every tensor, without reading any."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU or where the model is."""
        ...

    def identity(self, name: str) -> Hashable | None:
        """What tells a tensor apart without reading it; None where only its bytes do."""
        ...

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """B (out, r) and A (r, in) of a delta B @ A that is known in factors; None for any other."""
        ...

    def is_base(self, name: str) -> bool:
        """Whether a tensor is known, without reading it, to be the pretrained model's own."""
        ...


class StateSource:
    """Tensors that are in memory already."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = {name: tensor.detach() for name, tensor in state.items()}

    def shapes(self) -> Shapes:
        return {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        return self._state[name]

    def identity(self, name: str) -> None:
        return None

    def low_rank(self, name: str) -> None:
        return None

    def is_base(self, name: str) -> bool:
        return False


class FilesSource:
    """The safetensors files of a folder, single or sharded, or one such file.

    A memory map that stays open keeps everything that was read through it, and opening one anew for each small tensor
    of an adapter takes longer than factoring it: the map is renewed after `MAPPED_BYTES`.

    Args:
        path: the folder or file.
        dtypes: what some tensors are rounded to when read, as loading the model in half precision would.
        like: the pretrained model's shapes. What ``from_pretrained`` of its class would pass over is left out: other
            components (a text tower beside the vision tower) and old integer buffers.
        aliases: for a tensor that is tied to another, the names under which it may be stored instead.

    Raises:
        PlanError: naming the file that is missing, incomplete or corrupt.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dtypes: Mapping[str, torch.dtype] | None = None,
        like: Shapes | None = None,
        aliases: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self._dtypes = dtypes or {}
        components = {name.split(".")[0] for name in like or ()}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        self._stored_name: dict[str, str] = {}
        self._open: tuple[Path, Any] | None = None
        self._mapped = 0
        self._lock = threading.Lock()
        for file in weight_files(Path(path)):
            tensors = _opened(file)
            for name in tensors.keys():  # noqa: SIM118  safetensors' handle is no mapping
                part = tensors.get_slice(name)
                passed_over = name.split(".")[0] not in components or "F" not in part.get_dtype()
                if like is None or name in like or not passed_over:
                    self._add(name, name, file, tuple(part.get_shape()))
        for name, others in (aliases or {}).items():
            stored = next((other for other in others if other in self._shapes), None)
            if name not in self._shapes and stored is not None:
                self._add(name, stored, self._files[stored], self._shapes[stored])

    def _add(self, name: str, stored: str, file: Path, shape: tuple[int, ...]) -> None:
        self._shapes[name], self._files[name], self._stored_name[name] = shape, file, stored

    def shapes(self) -> Shapes:
        return self._shapes

    def read(self, name: str) -> Tensor:
        file = self._files[name]
        with self._lock:
            if self._open is None or self._open[0] != file or self._mapped > MAPPED_BYTES:
                self._open, self._mapped = (file, _opened(file)), 0
            tensor = self._open[1].get_tensor(self._stored_name[name])
            self._mapped += tensor.nbytes
        return tensor.to(self._dtypes.get(name, tensor.dtype))

    def identity(self, name: str) -> Hashable:
        stat = self._files[name].stat()
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, self._stored_name[name], self._dtypes.get(name)

    def low_rank(self, name: str) -> None:
        return None

    def is_base(self, name: str) -> bool:
        return False


def _opened(file: Path) -> Any:
    """`safe_open`, whose failure names the file."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PlanError(f"{file} can't be read: {error}; it is incomplete or corrupt") from None


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        PlanError: if there are none, or the index names one that is missing.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise PlanError(f"the folder {path} does not exist; correct its path")
    if (path / INDEX).exists():
        files = sorted({path / name for name in json.loads((path / INDEX).read_text())["weight_map"].values()})
    elif (path / SINGLE).exists():
        files = [path / SINGLE]
    else:
        raise PlanError(f"{path} holds neither {SINGLE} nor {INDEX}; save the model with save_pretrained")
    for file in files:
        if not file.exists():
            raise PlanError(f"{path} lacks {file.name}, which its index names: the checkpoint is incomplete")
    return files


class AdapterSource:
    """A PEFT LoRA adapter on top of the pretrained model, its deltas as factors, never merged.

    Honoured: ``r``, ``lora_alpha``, ``use_rslora``, ``rank_pattern``, ``alpha_pattern``, ``modules_to_save``, ``bias``.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: the pretrained model.

    Raises:
        PlanError: for another kind of adapter (named), one that needs another base, or a damaged one.
    """

    def __init__(self, folder: str | os.PathLike[str], base: Source) -> None:
        self._base, folder = base, Path(folder)
        settings = _adapter_settings(folder)
        self._tensors = FilesSource(folder / ADAPTER_FILE)
        self._replaced: dict[str, str] = {}
        self._factored: dict[str, tuple[str, str, float]] = {}
        shapes, base_shapes = self._tensors.shapes(), base.shapes()
        for key in shapes:
            name = key.removeprefix("base_model.model.")
            match = re.fullmatch(r"(.+)\.lora_(embedding_)?A(\.weight)?", name)
            if match:
                other = re.sub(r"\.lora_(embedding_)?A", r".lora_\1B", key)
                if other not in shapes:
                    raise PlanError(f"{folder}: {key} has no counterpart {other}; the adapter is incomplete")
                rank = shapes[key][0]
                self._factored[f"{match[1]}.weight"] = (other, key, _scaling(settings, match[1], rank))
            elif ".original_module." in name:
                continue  # what a module to save was before: bias="all" stores it, nothing uses it
            elif not re.search(r"\.lora_(embedding_)?B(\.weight)?$", name):
                self._replaced[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = key
        self._check(folder, shapes, base_shapes)

    def _check(self, folder: Path, shapes: Shapes, base_shapes: Shapes) -> None:
        for name, key in self._replaced.items():
            if "lora_" in name:
                raise PlanError(f"{folder}: the tensor {key} belongs to a kind of adapter that can't be read")
            if base_shapes.get(name) != shapes[key]:
                raise PlanError(_other_base(folder, name, base_shapes.get(name), shapes[key]))
        for name, (b, a, _) in self._factored.items():
            if len(shapes[a]) != 2 or len(shapes[b]) != 2:
                raise PlanError(f"{folder}: {name} is adapted by a convolution, not a linear layer; merge it first")
            needed = (shapes[b][0], shapes[a][1])
            needed = needed[::-1] if "lora_embedding_" in a else needed
            if base_shapes.get(name) != needed or shapes[b][1] != shapes[a][0]:
                raise PlanError(_other_base(folder, name, base_shapes.get(name), needed))

    def shapes(self) -> Shapes:
        return self._base.shapes()

    def read(self, name: str) -> Tensor:
        if name in self._replaced:
            return self._tensors.read(self._replaced[name])
        base = self._base.read(name)
        factors = self.low_rank(name)
        if factors is None:
            return base
        delta = (factors[0] @ factors[1]).to(base.device)
        delta = delta.T if "lora_embedding_" in self._factored[name][1] else delta
        return (base.to(delta.dtype) + delta).to(base.dtype)

    def identity(self, name: str) -> None:
        return None

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        if name not in self._factored:
            return None
        b_key, a_key, scaling = self._factored[name]
        b, a = self._tensors.read(b_key), self._tensors.read(a_key)
        dtype = torch.promote_types(a.dtype, torch.float32)
        return b.to(dtype) * scaling, a.to(dtype)

    def is_base(self, name: str) -> bool:
        return name not in self._replaced and name not in self._factored


def _other_base(folder: Path, name: str, base: tuple[int, ...] | None, adapter: tuple[int, ...]) -> str:
    found = "has no such tensor" if base is None else f"has the shape {base}"
    return (
        f"the adapter {folder} was made for another model: {name} needs {adapter}, the pretrained model {found}; "
        "use the base model that its adapter_config.json names"
    )


def _adapter_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f"{folder / ADAPTER_CONFIG} can't be read: {error}") from None
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise PlanError(f"{folder} is a {kind} adapter; of PEFT's adapters only LORA can be read: merge it first")
    for option in UNREADABLE:
        if settings.get(option):
            raise PlanError(f"{folder}: {option}={settings[option]!r} of a LoRA adapter can't be read; merge it first")
    start = str(settings.get("init_lora_weights", True)).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise PlanError(f"{folder}: init_lora_weights={start!r} changed the base model itself; merge it first")
    return settings


def _scaling(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's: α/r, or α/√r with rank-stabilised LoRA; a pattern names a module by its whole or its last parts."""

    def of(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        matching = (v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module))
        return next(matching, default)

    declared = of(settings.get("rank_pattern"), settings["r"])
    if declared != rank:
        raise PlanError(f"the adapter declares rank {declared} for {module}, its tensors have rank {rank}")
    alpha = of(settings.get("alpha_pattern"), settings["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


Openable = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | Source | Callable[[], nn.Module]


def open_source(what: Any, base: Source, aliases: Mapping[str, tuple[str, ...]] | None = None) -> Source | None:
    """The source of one model.

    Args:
        what: a module, a state dict, a folder (of a model, or of a PEFT adapter for `base`), a safetensors file, or a
            source already.
        base: the pretrained model.
        aliases: see `FilesSource`.

    Returns:
        None for anything else: it has to be loaded first.

    Raises:
        PlanError: for a folder or file that can't be read.
    """
    if isinstance(what, nn.Module):
        return StateSource(what.state_dict())
    if isinstance(what, Mapping):
        return StateSource(what)
    if isinstance(what, (str, os.PathLike)):
        if (Path(what) / ADAPTER_CONFIG).exists():
            return AdapterSource(what, base)
        return FilesSource(what, like=base.shapes(), aliases=aliases)
    return what if hasattr(what, "read") and hasattr(what, "shapes") else None


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every tensor that a model holds under several names, each name's others."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: tuple(n for n in names if n != name) for names in groups.values() if len(names) > 1 for name in names}
