"""The options of SMILE, their types and their validation."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from .exceptions import ConfigError

Execution = Literal["auto", "grouped", "masked", "merged"]
RoutingScope = Literal["token", "sequence", "global", "two_pass"]
RoutingScore = Literal["norm", "weighted", "relative", "dual", "output"]
ExpertParameters = Literal["layers", "norms", "all"]
Allocation = Literal["uniform", "energy", "gain"]
Storage = Literal["same", "int8"]

# the framework's methods for language models (`SmileMistralUpscalingAlgorithm`, …) have other names for these options
FRAMEWORK_NAMES = {
    "num_experts_per_tok": "top_k", "rank_of_router": "gate_k", "rank_of_expert": "k",
    "accelerator": "upscaling_accelerator", "model_save_path": "model_path",
}  # fmt: skip
# and these, which this library answers in another way
FRAMEWORK_ONLY = {
    "save_with_remote_code": "checkpoints hold no code, transformers loads them after `import fusion_bench_smile`",
    "model_type": "layers of every architecture are upscaled",
    "model_dtype": "the result has the dtype of the pretrained model, e.g. modelpool.model_kwargs.torch_dtype=bfloat16",
}
NEEDS_TWO_PASS: dict[str, Any] = {"noise_baseline": False, "expert_parameters": "layers", "refuse_unknown": False}


@dataclass(frozen=True)
class SmileConfig:
    """Options of SMILE upscaling (arXiv 2408.10174, section 4). The names are the framework's.

    Attributes:
        gate_k: Rank of the router: the number of leading right singular vectors of a delta that score its expert.
        k: Rank of the experts. −1 keeps the deltas dense.
        top_k: Number of experts that serve each token, from 1 to the number of experts.
        routing_use_diff: Route on the deltas Wᵢ − W₀ (True) or on the fine-tuned weights Wᵢ (False).
        average_experts: Average the experts' parameters outside the upscaled layers, instead of the pretrained ones.
        convolutions: Upscale `torch.nn.Conv2d` layers too, except grouped convolutions.
        target_modules: The layers to upscale, as in PEFT: ends of names (``"q_proj"``), regular expressions, or
            ``"all-linear"``; also patterns with wildcards. None selects all of them, the output head included.
        exclude_modules: Layers that stay as pretrained, in the same form.
        execution: How a routed layer is computed: ``"auto"``, ``"grouped"``, ``"masked"`` or, with ``two_pass`` and
            ``top_k=1``, ``"merged"``. See `fusion_bench_smile.nn.execution`.
        routing_scope: What shares one choice of experts: each ``"token"`` of each layer (the paper), each input in each
            layer (``"sequence"``), each input in each layer by the scores of all layers so far (``"global"``), or each
            input in all layers, after a first pass of the pretrained model (``"two_pass"``).
            See `fusion_bench_smile.nn.input_router`.
        routing_score: The router's score: ``"norm"`` (the paper), ``"weighted"``, ``"relative"``, ``"dual"`` or
            ``"output"``. See `fusion_bench_smile.nn.scoring`.
        noise_baseline: Standardise each expert's score by its mean and deviation on random inputs. Needs ``two_pass``.
        expert_parameters: The parameters of an expert that are used: those of its ``"layers"``, its ``"norms"`` too, or
            ``"all"``, embeddings included. The last two need ``two_pass``.
        refuse_unknown: Serve inputs that are far from all calibrated tasks with the pretrained model. Needs
            ``two_pass`` and `calibrate`.
        param_ratio: Upper bound of the parameter ratio. Ranks up to k are allocated within it. None takes k everywhere.
        allocation: How `param_ratio` is spent on ranks: ``"uniform"``, ``"energy"`` or ``"gain"``.
            See `fusion_bench_smile.construction.rank_allocation`.
        storage: Storage of the factors: the ``"same"`` dtype as the model, or ``"int8"``.
        device: Device of the factorization: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, …
        upscaling_accelerator: The same under the framework's second name. It takes precedence over `device`.
        full_matrices: Accepted as by the framework's SMILE. The result does not depend on it.

    Raises:
        ConfigError: A value has the wrong type, lies outside its range, or contradicts another option.
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
    routing_scope: RoutingScope = "token"
    routing_score: RoutingScore = "norm"
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
        self._check_types()
        self._check_ranges()
        self._check_combinations()
        self._check_budget()
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _as_patterns(getattr(self, name)))
        if self.exclude_modules is None:
            object.__setattr__(self, "exclude_modules", ())
        self.compute_device  # noqa: B018  an unavailable device is refused here, before any model is loaded

    def _check_types(self) -> None:
        for name, hint in get_type_hints(SmileConfig).items():
            value, choices = getattr(self, name), get_args(hint)
            if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"{name}={value!r} is not an integer")
            if hint is bool and not isinstance(value, bool):
                raise ConfigError(f"{name}={value!r} is not true or false")
            if get_origin(hint) is Literal and value not in choices:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}")

    def _check_ranges(self) -> None:
        if self.gate_k < 1:
            raise ConfigError(f"gate_k={self.gate_k}: the router needs a rank of at least 1")
        if self.k < 1 and self.k != -1:
            raise ConfigError(f"k={self.k}: an expert needs a rank of at least 1, or −1 to stay dense")
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: at least 1 expert must serve each token")

    def _check_combinations(self) -> None:
        for name, default in NEEDS_TWO_PASS.items():
            if getattr(self, name) != default and self.routing_scope != "two_pass":
                raise ConfigError(
                    f"{name}={getattr(self, name)} needs routing_scope=two_pass, which chooses the experts before the "
                    f"first layer runs; routing_scope is {self.routing_scope}"
                )
        if self.execution == "merged" and (self.routing_scope != "two_pass" or self.top_k != 1):
            raise ConfigError(
                f"execution=merged needs routing_scope=two_pass and top_k=1, one expert for a whole input; they are "
                f"{self.routing_scope} and {self.top_k}: use execution=auto"
            )
        if self.average_experts and self.expert_parameters != "layers":
            raise ConfigError(
                f"average_experts=true and expert_parameters={self.expert_parameters} exclude each other: norms are "
                "either averaged or kept for each expert"
            )

    def _check_budget(self) -> None:
        if self.param_ratio is None:
            return
        number = isinstance(self.param_ratio, (int, float)) and not isinstance(self.param_ratio, bool)
        if not number or not 1 < self.param_ratio < math.inf:
            raise ConfigError(f"param_ratio={self.param_ratio!r} is not a number above 1, or null to take k everywhere")
        if self.k == -1:
            raise ConfigError("param_ratio allocates ranks up to k; k=-1 keeps experts dense and has no ranks")
        if self.gate_k > self.k and self.routing_use_diff:
            raise ConfigError(f"gate_k={self.gate_k} is above k={self.k}, the largest rank that param_ratio allocates")

    @property
    def compute_device(self) -> torch.device:
        """The device of the factorization. Raises ConfigError if this machine does not have the device."""
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
        """All options by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SmileConfig:
        """Build a config from a mapping.

        Raises ConfigError if a key is unknown; the message names the nearest valid one.
        """
        check_keys(options, [f.name for f in fields(cls)])
        return cls(**options)

    @classmethod
    def from_checkpoint(cls, options: Mapping[str, Any]) -> SmileConfig:
        """Build a config from a checkpoint's options, without the device of the machine that wrote it."""
        return cls.from_dict({**options, "device": "auto", "upscaling_accelerator": None})

    @classmethod
    def resolve(cls, config: SmileConfig | None, options: Mapping[str, Any]) -> SmileConfig:
        """The config of a call that takes either a config or keywords.

        Raises ConfigError if both are given, or a keyword is unknown.
        """
        if config is not None and options:
            raise ConfigError(f"give either config or keywords, not both (got {', '.join(options)})")
        return config or cls.from_dict(options)


def with_own_names(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the names of the framework's methods for language models, see `FRAMEWORK_NAMES`.

    An option that is None under such a name is not given, and any other value takes the place of the default.
    Raises ConfigError if an option has two values, its default aside.
    """
    names = {name: own for name, own in FRAMEWORK_NAMES.items() if options.get(name) is not None}
    result = {name: value for name, value in options.items() if name not in (*FRAMEWORK_NAMES, *FRAMEWORK_ONLY)}
    for name, own in names.items():
        value = options[name]
        if own == "k" and isinstance(value, int) and value < 0:
            value = -1  # any negative rank keeps experts dense
        if result.get(own, defaults[own]) not in (defaults[own], value):
            raise ConfigError(f"{own}={result[own]} and {name}={value} are one option: give one of them")
        result[own] = value
    return result


def check_keys(options: Mapping[str, Any], valid: list[str]) -> None:
    """Refuse unknown keys with a ConfigError that names each, and the nearest valid one."""
    unknown = [key for key in options if key not in valid]
    if not unknown:
        return
    hints = []
    for key in unknown:
        near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
        hints.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    raise ConfigError(f"unknown option {', '.join(hints)}; valid options: {', '.join(valid)}")


def _as_patterns(value: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, str) else tuple(str(pattern) for pattern in value)
