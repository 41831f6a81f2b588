"""The options of SMILE, their types and their validation."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from .exceptions import ConfigError

Execution = Literal["auto", "grouped", "masked"]
RoutingScope = Literal["token", "input"]
Storage = Literal["same", "int8", "int4"]

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
# options of earlier versions, and what they became
REMOVED = {
    "routing_score": "token routing scores by norm, the paper's, and routing_scope=input by the share of energy",
    "noise_baseline": "no benchmark gained by it",
    "expert_parameters": "norms and embeddings are the pretrained model's; average_experts=true averages them",
    "allocation": "directions with the most energy for a parameter come first",
}
REMOVED_EXECUTION = "merged"
REMOVED_SCOPES = ("two_pass", "global", "sequence")  # one choice of experts for an input, which ``input`` makes


@dataclass(frozen=True)
class SmileConfig:
    """Options of SMILE upscaling (arXiv 2408.10174, section 4). The names are the framework's.

    Attributes:
        gate_k: Rank of the router: the number of leading right singular vectors of a delta that score its expert. None
            is the rank k of the experts, whose rows the router shares: it needs no parameters of its own.
        k: Rank of the experts. −1 keeps the deltas dense.
        density: With ``k=-1``, the share of a delta's entries that is kept, at random and rescaled, e.g. 0.02. None
            keeps all. See `fusion_bench_smile.nn.sparsity`.
        top_k: Number of experts that serve each token, from 1 to the number of experts.
        routing_use_diff: Route on the deltas Wᵢ − W₀ (True) or on the fine-tuned weights Wᵢ (False).
        average_experts: Average the experts' parameters outside the upscaled layers, instead of the pretrained ones.
        convolutions: Upscale `torch.nn.Conv2d` layers too, except grouped convolutions.
        target_modules: The layers to upscale, as in PEFT: ends of names (``"q_proj"``), regular expressions, or
            ``"all-linear"``; also patterns with wildcards. None selects all of them, the output head included.
        exclude_modules: Layers that stay as pretrained, in the same form.
        execution: How a routed layer is computed: ``"auto"``, ``"grouped"`` or ``"masked"``. See
            `fusion_bench_smile.nn.execution`.
        routing_scope: What shares one choice of experts: each ``"token"`` of each layer (the paper), or each
            ``"input"`` in all layers, by a first pass of the pretrained model. See
            `fusion_bench_smile.nn.input_router`.
        refuse_unknown: Serve inputs that are far from all calibrated tasks with the pretrained model. Needs
            ``routing_scope="input"`` and `calibrate`.
        param_ratio: Upper bound of the parameter ratio. Ranks up to k are allocated within it. None takes k everywhere.
        byte_ratio: Upper bound of the ratio of stored bytes, in the same way; at most one of both is given.
        storage: Storage of the factors: the ``"same"`` dtype as the model, ``"int8"`` or ``"int4"``.
            See `fusion_bench_smile.nn.quantization`.
        device: Device of the factorization: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, …
        upscaling_accelerator: The same under the framework's second name. It takes precedence over `device`.
        full_matrices: Accepted as by the framework's SMILE. The result does not depend on it.

    Raises:
        ConfigError: A value has the wrong type, lies outside its range, or contradicts another option.
    """

    gate_k: int | None = 16
    k: int = 32
    density: float | None = None
    top_k: int = 1
    routing_use_diff: bool = True
    average_experts: bool = False
    convolutions: bool = False
    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] = field(default=())
    execution: Execution = "auto"
    routing_scope: RoutingScope = "token"
    refuse_unknown: bool = False
    param_ratio: float | None = None
    byte_ratio: float | None = None
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
            is_rank = name == "gate_k" and value is not None
            if name == "execution" and value == REMOVED_EXECUTION:
                raise ConfigError(f"{name}={value} was removed: {name}=auto merges weights where it pays")
            if name == "routing_scope" and value in REMOVED_SCOPES:
                raise ConfigError(f"{name}={value} is now {name}=input, one choice of experts for each input")
            if (hint is int or is_rank) and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"{name}={value!r} is not an integer")
            if hint is bool and not isinstance(value, bool):
                raise ConfigError(f"{name}={value!r} is not true or false")
            if get_origin(hint) is Literal and value not in choices:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}")

    def _check_ranges(self) -> None:
        if self.gate_k is not None and self.gate_k < 1:
            raise ConfigError(f"gate_k={self.gate_k}: the router needs a rank of at least 1")
        if self.k < 1 and self.k != -1:
            raise ConfigError(f"k={self.k}: an expert needs a rank of at least 1, or −1 to stay dense")
        if self.gate_k is None and self.k == -1:
            raise ConfigError("gate_k=null is the rank k of the experts, and k=-1 keeps them dense: set gate_k")
        self._check_density()
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: at least 1 expert must serve each token")

    def _check_density(self) -> None:
        value = self.density
        if value is None:
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < 1:
            raise ConfigError(f"density={value!r} is not a share between 0 and 1, or null to keep all entries")
        if self.k != -1:
            raise ConfigError(f"density={value} keeps a share of dense deltas, which k=-1 gives; k is {self.k}")

    def _check_combinations(self) -> None:
        if self.refuse_unknown and self.routing_scope != "input":
            raise ConfigError("refuse_unknown=true needs routing_scope=input, which compares whole inputs")

    def _check_budget(self) -> None:
        budgets = {n: v for n in ("param_ratio", "byte_ratio") if (v := getattr(self, n)) is not None}
        if len(budgets) > 1:
            raise ConfigError("param_ratio and byte_ratio are two budgets of one model: set one of them")
        for name, value in budgets.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 1 < value < math.inf:
                raise ConfigError(f"{name}={value!r} is not a number above 1, or null to take k everywhere")
            if self.k == -1:
                raise ConfigError(f"{name} allocates ranks up to k; k=-1 keeps experts dense and has no ranks")
            if self.gate_k is None and self.routing_use_diff:
                raise ConfigError(f"{name} needs a gate_k: it allocates ranks from gate_k to k, and gate_k=null is k")
            if self.router_rank > self.k and self.routing_use_diff:
                raise ConfigError(f"gate_k={self.gate_k} is above k={self.k}, the largest rank that {name} allocates")

    @property
    def router_rank(self) -> int:
        """The rank of the router: `gate_k`, or k where that is None."""
        return self.k if self.gate_k is None else self.gate_k

    @property
    def has_budget(self) -> bool:
        """Whether ranks are allocated within a budget."""
        return self.param_ratio is not None or self.byte_ratio is not None

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
        """Build a config from a checkpoint's options, without the device of the machine that wrote it.

        Options of earlier versions are left out, and their routing scopes of whole inputs are read as ``input``.
        """
        current = {name: value for name, value in options.items() if name not in REMOVED}
        if current.get("routing_scope") in REMOVED_SCOPES:
            current["routing_scope"] = "input"
        if current.get("execution") == REMOVED_EXECUTION:
            current["execution"] = "auto"
        return cls.from_dict({**current, "device": "auto", "upscaling_accelerator": None})

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
    if removed := [key for key in unknown if key in REMOVED]:
        raise ConfigError(f"the option {removed[0]} was removed: {REMOVED[removed[0]]}")
    hints = []
    for key in unknown:
        near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
        hints.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    raise ConfigError(f"unknown option {', '.join(hints)}; valid options: {', '.join(valid)}")


def _as_patterns(value: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, str) else tuple(str(pattern) for pattern in value)
