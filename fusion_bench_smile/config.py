"""The typed options of SMILE, their validation and their messages."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

import torch

from .errors import ConfigError
from .layers import Execution


@dataclass(frozen=True)
class SmileConfig:
    """Options of SMILE upscaling (arXiv 2408.10174, section 4); names are the framework's own.

    Attributes:
        gate_k: rank of the router: how many leading right singular vectors of an expert's delta score it.
        k: rank of the experts; −1 keeps the deltas dense.
        top_k: how many experts serve each token, from 1 to the number of experts.
        routing_use_diff: route on the deltas Wᵢ − W₀ (True) or on the fine-tuned weights Wᵢ (False).
        average_experts: average the parameters outside the upscaled layers over the experts instead of keeping the
            pretrained ones.
        convolutions: upscale `torch.nn.Conv2d` too, except those in groups.
        target_modules: name patterns (``fnmatch``) of the linear layers to upscale; None upscales all.
        exclude_modules: name patterns of linear layers to leave as pretrained.
        execution: how the routed layers are computed: ``"auto"``, ``"grouped"`` or ``"masked"``; see `layers`.
        device: where the factors are computed: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, …
        upscaling_accelerator: the same under the framework's second name; if set, it wins over `device`.
        full_matrices: accepted for commands written for the framework's SMILE; square U and V are never formed, and
            the result does not depend on it.

    Raises:
        ConfigError: for a value of the wrong type or outside its range.
    """

    gate_k: int = 16
    k: int = 32
    top_k: int = 1
    routing_use_diff: bool = True
    average_experts: bool = False
    convolutions: bool = False
    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] = field(default=())
    execution: Execution = "auto"
    device: str = "auto"
    upscaling_accelerator: str | None = None
    full_matrices: bool = False

    def __post_init__(self) -> None:
        for name in ("gate_k", "k", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name}={value!r} is not a whole number")
        for name in ("routing_use_diff", "average_experts", "convolutions", "full_matrices"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not true or false")
        if self.gate_k < 1:
            raise ConfigError(f"gate_k={self.gate_k}: the router needs a rank of at least 1")
        if self.k < 1 and self.k != -1:
            raise ConfigError(f"k={self.k}: an expert needs a rank of at least 1, or −1 to stay dense")
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: at least 1 expert must serve each token")
        if self.execution not in get_args(Execution):
            raise ConfigError(f"execution={self.execution!r} is not one of {', '.join(get_args(Execution))}")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            if value is not None:
                object.__setattr__(self, name, tuple(str(pattern) for pattern in value))
        if self.exclude_modules is None:
            object.__setattr__(self, "exclude_modules", ())
        self.compute_device  # noqa: B018  an impossible device is refused here, before any model is loaded

    @property
    def compute_device(self) -> torch.device:
        """The device the factors are computed on.

        Raises:
            ConfigError: if this machine doesn't have it.
        """
        name = self.upscaling_accelerator or self.device
        if name == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except (RuntimeError, TypeError):
            raise ConfigError(f"device={name!r} is not a device; use auto, cpu, cuda or cuda:1") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use device=auto"
            )
        return device

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def given(cls, config: SmileConfig | None, options: Mapping[str, Any]) -> SmileConfig:
        """The options of a call that takes them either as a config or as keywords.

        Raises:
            ConfigError: if both are given, or for an unknown keyword.
        """
        if config is not None and options:
            raise ConfigError(f"give either config or keywords, not both (got {', '.join(options)})")
        return config or cls.from_dict(options)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SmileConfig:
        """Build from a mapping.

        Raises:
            ConfigError: for an unknown key; the message names the nearest valid one.
        """
        check_keys(options, [f.name for f in fields(cls)])
        return cls(**options)


def check_keys(options: Mapping[str, Any], known: list[str]) -> None:
    """Refuse unknown keys.

    Raises:
        ConfigError: naming every unknown key and the nearest valid one.
    """
    unknown = [key for key in options if key not in known]
    if not unknown:
        return
    hints = []
    for key in unknown:
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        hints.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    raise ConfigError(f"unknown option {', '.join(hints)}; valid options: {', '.join(known)}")
