"""The typed options of SMILE, their validation and their messages."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

import torch

from .budget import Allocation
from .errors import ConfigError
from .layers import Execution, Score, Storage
from .own import ExpertParameters
from .scopes import Scope

CHOICES: dict[str, Any] = {
    "execution": Execution, "routing_scope": Scope, "routing_score": Score, "expert_parameters": ExpertParameters,
    "allocation": Allocation, "storage": Storage,
}  # fmt: skip
FLAGS = ("noise_baseline", "refuse_unknown")


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
        execution: how the routed layers are computed: ``"auto"``, ``"grouped"``, ``"masked"`` or, with ``two_pass``
            and one expert for each input, ``"merged"``; see `layers`.
        routing_scope: what shares one choice of experts: every ``"token"`` of every layer has its own (the paper), a
            ``"sequence"`` has one for each layer, a ``"global"`` one goes by all layers so far, and in ``"two_pass"``
            the pretrained model sees the input first, which then has one choice for all layers; see `scopes`.
        routing_score: what says how well an expert fits: ``"norm"`` (the paper), ``"weighted"``, ``"relative"``,
            ``"dual"`` or ``"output"``; see `layers.Routed.scores`.
        noise_baseline: compare each expert's score with what random inputs get (needs ``two_pass``): for LoRA experts,
            some of which score high whatever the input.
        expert_parameters: what of an expert is used: its ``"layers"``, its ``"norms"`` too, or ``"all"``, embeddings
            included (needs ``two_pass``).
        refuse_unknown: give the pretrained model to inputs that are like no task's (needs `calibrate`).
        param_ratio: choose ranks, up to k, so that the result has at most so many times the pretrained model's
            parameters; None takes k everywhere.
        allocation: which ranks a `param_ratio` buys: ``"uniform"``, ``"energy"`` or ``"gain"``; see `budget.allocate`.
        storage: of the experts' factors: the ``"same"`` dtype as the model's, or ``"int8"``.
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
    routing_scope: Scope = "token"
    routing_score: Score = "norm"
    noise_baseline: bool = False
    expert_parameters: ExpertParameters = "layers"
    refuse_unknown: bool = False
    param_ratio: float | None = None
    allocation: Allocation = "uniform"
    storage: Storage = "same"
    device: str = "auto"
    upscaling_accelerator: str | None = None
    full_matrices: bool = False

    def __post_init__(self) -> None:
        for name in ("gate_k", "k", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name}={value!r} is not a whole number")
        for name in ("routing_use_diff", "average_experts", "convolutions", "full_matrices", *FLAGS):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not true or false")
        if self.gate_k < 1:
            raise ConfigError(f"gate_k={self.gate_k}: the router needs a rank of at least 1")
        if self.k < 1 and self.k != -1:
            raise ConfigError(f"k={self.k}: an expert needs a rank of at least 1, or −1 to stay dense")
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: at least 1 expert must serve each token")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(choices))}")
        self._check_combinations()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            if value is not None:
                object.__setattr__(self, name, tuple(str(pattern) for pattern in value))
        if self.exclude_modules is None:
            object.__setattr__(self, "exclude_modules", ())
        self.compute_device  # noqa: B018  an impossible device is refused here, before any model is loaded

    def _check_combinations(self) -> None:
        for name, plain in {"noise_baseline": False, "expert_parameters": "layers", "refuse_unknown": False}.items():
            if getattr(self, name) != plain and self.routing_scope != "two_pass":
                raise ConfigError(
                    f"{name}={getattr(self, name)} needs routing_scope=two_pass, where one choice is known before the "
                    f"first layer; it is {self.routing_scope}"
                )
        if self.execution == "merged" and (self.routing_scope != "two_pass" or self.top_k != 1):
            raise ConfigError(
                f"execution=merged needs routing_scope=two_pass and top_k=1, where an input has one expert's weights "
                f"throughout; they are {self.routing_scope} and {self.top_k}: use execution=auto"
            )
        if self.average_experts and self.expert_parameters != "layers":
            raise ConfigError(
                f"average_experts=true and expert_parameters={self.expert_parameters} exclude each other: norms are "
                "either averaged, or each expert's own"
            )
        if self.param_ratio is None:
            return
        number = isinstance(self.param_ratio, (int, float)) and not isinstance(self.param_ratio, bool)
        if not number or not 1 < self.param_ratio < math.inf:
            raise ConfigError(f"param_ratio={self.param_ratio!r} is not a number above 1, or null to take k everywhere")
        if self.k == -1:
            raise ConfigError("param_ratio chooses ranks up to k; with k=-1 there are none, experts stay dense")
        if self.gate_k > self.k and self.routing_use_diff:
            raise ConfigError(f"gate_k={self.gate_k} is above k={self.k}, up to which param_ratio chooses ranks")

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
    def recorded(cls, options: Mapping[str, Any]) -> SmileConfig:
        """The options that a checkpoint was built with; where it was factored then says nothing about this machine."""
        return cls.from_dict({**options, "device": "auto", "upscaling_accelerator": None})

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
