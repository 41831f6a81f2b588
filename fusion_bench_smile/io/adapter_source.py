"""PEFT LoRA adapters, read as the factors they are. Imports PEFT."""

import math
import os
import re
from collections.abc import Container, Hashable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import regex
import torch
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..exceptions import CheckpointError, PlanError
from .schema import read_json
from .sources import Shapes, Source
from .text import shortened
from .weight_files import ADAPTER_CONFIG, open_adapter_weights

Number = TypeVar("Number", int, float)
MAX_SECONDS = 1.0  # to match one pattern
# options with which an adapter computes something else than (W + scaling·BA)x
UNSUPPORTED = (
    "use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "alora_invocation_tokens", "layer_replication",
    "megatron_config", "target_parameters", "trainable_token_indices", "arrow_config",
)  # fmt: skip
# initialisations that change the pretrained weights
UNSUPPORTED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterSource(Source):
    """A PEFT LoRA adapter on top of the pretrained model. Its deltas stay in factors and are never merged.

    Supported settings: ``r``, ``lora_alpha``, ``use_rslora``, ``rank_pattern``, ``alpha_pattern``,
    ``modules_to_save``, ``bias``. A tensor depends on the pretrained model too, so it has no identity.
    Raises PlanError if the adapter is of another kind (named), was made for another base model, or is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], pretrained: Source) -> None:
        self._pretrained, folder = pretrained, Path(folder)
        config = load_lora_config(folder)
        self._settings = (folder / ADAPTER_CONFIG).read_text()
        self._tensors = open_adapter_weights(folder)
        self._replaced: dict[str, str] = {}  # name in the model → key of a tensor stored whole
        self._factors: dict[str, tuple[str, str, float]] = {}  # name in the model → keys of B and A, scaling
        shapes = self._tensors.shapes()
        for key in shapes:
            name = key.removeprefix("base_model.model.")
            if match := re.fullmatch(r"(.+)\.lora_(embedding_)?A(\.weight)?", name):
                counterpart = re.sub(r"\.lora_(embedding_)?A", r".lora_\1B", key)
                if counterpart not in shapes:
                    raise PlanError(f"{folder}: {key} has no counterpart {counterpart}; the adapter is incomplete")
                _check_module(folder, match[1], pretrained.shapes())
                self._factors[f"{match[1]}.weight"] = (counterpart, key, _scaling(config, match[1], shapes[key][0]))
            elif ".original_module." in name:
                continue  # the pretrained part of a module in modules_to_save: bias="all" stores it, nothing uses it
            elif not re.search(r"\.lora_(embedding_)?B(\.weight)?$", name):
                self._replaced[_model_name(name, pretrained.shapes())] = key
        self._check_shapes(folder, shapes, pretrained.shapes())

    def _check_shapes(self, folder: Path, shapes: Shapes, pretrained_shapes: Shapes) -> None:
        for name, key in self._replaced.items():
            if "lora_" in name:
                raise PlanError(f"{folder}: the tensor {key} belongs to a kind of adapter that can't be read")
            if pretrained_shapes.get(name, ())[1:] != shapes[key][1:] or name not in pretrained_shapes:
                raise PlanError(_other_base_model(folder, name, pretrained_shapes.get(name), shapes[key]))
        for name, (b, a, _) in self._factors.items():
            if len(shapes[a]) != 2 or len(shapes[b]) != 2:
                raise PlanError(f"{folder}: {name} is adapted by a convolution, not a linear layer; merge it first")
            required = (shapes[b][0], shapes[a][1])
            required = required[::-1] if "lora_embedding_" in a else required
            if self.shapes().get(name) != required or shapes[b][1] != shapes[a][0]:
                raise PlanError(_other_base_model(folder, name, pretrained_shapes.get(name), required))

    def stamp(self) -> Hashable | None:
        """See `Source.stamp`. The pretrained model is not part of it."""
        return self._tensors.stamp(), self._settings

    def digest(self) -> str:
        """See `Source.digest`. Neither the pretrained model nor merged weights are part of it."""
        return f"{self._tensors.digest()}/{self._settings}"

    def shapes(self) -> Shapes:
        """See `Source.shapes`. A tensor that is stored whole may have another number of rows: added tokens."""
        stored = self._tensors.shapes()
        return {**self._pretrained.shapes(), **{name: stored[key] for name, key in self._replaced.items()}}

    def read(self, name: str) -> Tensor:
        """See `Source.read`. An adapted weight is computed as W + scaling·BA."""
        stored = self._replaced.get(name)
        start = self._pretrained.read(name) if stored is None else self._tensors.read(stored)
        if name not in self._factors:
            return start
        b, a = self._read_factors(name)
        delta = (b @ a).to(start.device)
        delta = delta.T if "lora_embedding_" in self._factors[name][1] else delta
        return (start.to(delta.dtype) + delta).to(start.dtype)

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """scaling·B (out, r) and A (r, in), at least float32; None for a tensor that is not adapted or stored whole."""
        return None if name not in self._factors or name in self._replaced else self._read_factors(name)

    def _read_factors(self, name: str) -> tuple[Tensor, Tensor]:
        b_key, a_key, scaling = self._factors[name]
        b, a = self._tensors.read(b_key), self._tensors.read(a_key)
        dtype = torch.promote_types(a.dtype, torch.float32)
        return b.to(dtype) * scaling, a.to(dtype)

    def is_pretrained(self, name: str) -> bool:
        """Whether the adapter leaves a tensor alone."""
        return name not in self._replaced and name not in self._factors

    def max_rank(self, name: str) -> int | None:
        """See `Source.max_rank`: that of the adapter's factors."""
        if name not in self._factors or name in self._replaced:
            return super().max_rank(name)
        b_key, _, _ = self._factors[name]
        return self._tensors.shapes()[b_key][1]

    def nbytes(self) -> int | None:
        """See `Source.nbytes`."""
        return self._tensors.total_bytes()


def _check_module(folder: Path, module: str, known: Container[str]) -> None:
    """Refuse an adapter of a `torch.nn.MultiheadAttention`."""
    attention = module.removesuffix(".base_layer.out_proj")
    if attention != module or f"{module}.in_proj_weight" in known or f"{module}.in_proj.weight" in known:
        # measured with PEFT 0.21.2, see its pull request 3774; a release that adds it once computes something else
        raise PlanError(
            f"{folder}: {attention} is a torch.nn.MultiheadAttention, where PEFT 0.21 adds the delta of out_proj twice:"
            " merge the adapter with the release that trained it"
        )


def _model_name(name: str, known: Container[str]) -> str:
    """The model's name for a tensor of an adapter that is stored whole, also in split attention."""
    name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    split = name.replace(".in_proj_", ".in_proj.")
    return name if name in known else split


class _LoraValues(BaseModel):
    """The settings of a LoRA adapter that its factors depend on."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: float = 8.0
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False


def load_lora_config(folder: Path) -> LoraConfig:
    """The settings of a LoRA adapter; PlanError if they cannot be read, or give something else than W + scaling·BA."""
    try:
        settings = read_json(folder / ADAPTER_CONFIG)
    except CheckpointError as error:
        raise PlanError(f"{error}; save the adapter again") from None
    if (kind := settings.get("peft_type")) != "LORA":
        raise PlanError(
            f"{folder} is a {shortened(kind)} adapter; of PEFT's adapters only LORA can be read: merge it first"
        )
    for option in UNSUPPORTED:
        if settings.get(option):
            problem = f"{option}={shortened(repr(settings[option]))} of a LoRA adapter can't be read"
            raise PlanError(f"{folder}: {problem}; merge it first")
    init = str(settings.get("init_lora_weights", True)).lower()
    if init.startswith(UNSUPPORTED_INITS):
        raise PlanError(
            f"{folder}: init_lora_weights={shortened(repr(init))} changed the base model itself; merge it first"
        )
    try:
        _LoraValues.model_validate(settings)
        return LoraConfig.from_pretrained(str(folder))
    except ValidationError as error:
        first = error.errors()[0]
        problem = shortened(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    except Exception as error:  # PEFT passes most values on, where they may fail in any way
        problem = shortened(error)
    raise PlanError(f"{folder / ADAPTER_CONFIG} can't be read: {problem}; save the adapter again")


def _scaling(config: LoraConfig, module: str, rank: int) -> float:
    """PEFT's scaling: α/r, or α/√r with rank-stabilised LoRA."""
    declared = _pattern_value(config.rank_pattern or {}, module, config.r)
    if declared != rank:
        raise PlanError(f"the adapter declares rank {declared} for {module}, its tensors have rank {rank}")
    alpha = _pattern_value(config.alpha_pattern or {}, module, config.lora_alpha)
    return float(alpha) / (math.sqrt(rank) if config.use_rslora else rank)


def _pattern_value(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """The value of the first pattern that matches a module, as PEFT finds it, but in bounded time.

    Some regular expressions take time that grows exponentially with the name, and an adapter may come from anybody.
    """
    for pattern, value in patterns.items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", module, timeout=MAX_SECONDS):
                return value
        except (regex.error, TimeoutError) as error:
            reason = "takes too long" if isinstance(error, TimeoutError) else f"is invalid: {error}"
            raise PlanError(
                f"the adapter's pattern {pattern[:40]!r} {reason}; write the modules' names instead"
            ) from None
    return default


def _other_base_model(folder: Path, name: str, pretrained: tuple[int, ...] | None, adapter: tuple[int, ...]) -> str:
    problem = "has no such tensor" if pretrained is None else f"has the shape {pretrained}"
    return (
        f"the adapter {folder} was made for another model: {name} needs {adapter}, the pretrained model {problem}; "
        "use the base model that its adapter_config.json names"
    )
