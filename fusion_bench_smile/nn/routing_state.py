"""The state of one call of a model: what a router for whole inputs knows about its inputs so far.

The state lives in a context variable, so that threads do not share it, and ends with the call. While a model generates,
a copy is kept with the cache, or with the encoder's output, that continues the inputs of the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .input_execution import InputGroups
from .merged_weights import Choice

if TYPE_CHECKING:
    from .input_router import InputRouter
    from .routed import RoutedLayer

MIN_ENERGY_SHARE = 1e-12  # below it the logarithm of a share of energy is cut off
CACHE_ARGUMENTS = ("past_key_values", "cache_params", "state", "mems")  # of models of transformers
KEPT = "smile_routing"  # the attribute of a cache that keeps a state

_active: ContextVar[tuple[RoutingState, ...]] = ContextVar("smile_routing_states", default=())
_kept_with_tensors = WeakTensorKeyDictionary()  # of encoder outputs, and of caches that are lists of tensors


@dataclass(eq=False)
class RoutingState:
    """What a router knows while a batch of B inputs passes the model. T is the number of experts."""

    router: InputRouter | None = None
    num_inputs: int | None = None  # B; None until the inputs enter, e.g. the encoder
    mask: Tensor | None = None  # (B, tokens), bool, the tokens that count; None counts all
    num_candidates: int = 0  # tokens after the prompt that an assistant proposes, in the first call of a generation
    is_trained: bool = False  # the call computes gradients, after which the router rows may change
    merges: bool = False  # the choice holds for several calls, so that its experts are added to the weights
    is_given: bool = False  # the user named the experts; with B = 1 for any number of inputs
    in_first_pass: bool = False  # the pretrained model alone processes the inputs, and its layers are scored
    collects_features: bool = False  # the first pass collects the features of prototypes
    inputs_of_layers: dict[RoutedLayer, list[Tensor]] | None = None  # recorded instead of scored, see `attribution`
    scores: Tensor | None = None  # that the choice rests on, (B, T)
    choice: Tensor | None = None  # the weight of each expert for each input in all layers, (B, T)
    can_end_early: bool = False  # the first pass ends with the last of the `awaited` layers
    awaited: set[RoutedLayer] = field(default_factory=set)  # the layers that the first pass has yet to score
    features: list[Tensor] = field(default_factory=list)  # of each layer so far, (B, T), for prototypes (B, 2·T)
    num_served: int | None = None  # the number of experts of an input, at most; None is unknown
    _served: tuple[Tensor, Tensor] | None = None  # kept for all layers, as the groups
    _groups: InputGroups | None = None
    _one_choice: Choice | None = None  # kept, since a device has to be waited for

    @property
    def input_features(self) -> Tensor:
        """The features of the inputs, of all layers so far: (B, 2·T·layers)."""
        return torch.cat(self.features, dim=-1)

    @property
    def one_choice(self) -> Choice | None:
        """The choice that all inputs of the call have, because there is one; None for several, or without values."""
        if self._one_choice is None and self.choice is not None and len(self.choice) == 1:
            try:
                (weights,) = self.choice.tolist()
            except (NotImplementedError, RuntimeError):  # on the meta device, and under `torch.func.vmap`
                return None
            self._one_choice = tuple((expert, weight) for expert, weight in enumerate(weights) if weight)
        return self._one_choice

    @property
    def served_by(self) -> list[str]:
        """For each input the name of the expert with the largest weight in the choice."""
        assert self.router is not None
        assert self.choice is not None, "the call has not chosen"
        return [self.router.experts[index] for index in self.choice.argmax(dim=-1).tolist()]

    def served_inputs(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The `num_served` experts of each input with weights (B, T), and their weights: both (B, num_served)."""
        if self._served is None or len(self._served[0]) != len(weights):
            assert self.num_served is not None
            experts = weights.abs().topk(self.num_served, dim=-1).indices
            self._served = experts, weights.gather(-1, experts)
        return self._served

    def group_inputs(self, weights: Tensor) -> InputGroups:
        """The inputs with weights (B, T), grouped by the experts that have a weight other than zero for them."""
        if self._groups is None or self._groups.num_inputs != len(weights):
            members = [(expert, weights[:, expert].nonzero()[:, 0]) for expert in range(weights.shape[1])]
            self._groups = InputGroups(len(weights), [(expert, inputs) for expert, inputs in members if len(inputs)])
        return self._groups

    def copy(self) -> RoutingState:
        """The decisions so far, for a call that continues the same inputs and may add others."""
        return replace(self, features=[])

    def __deepcopy__(self, memo: Any) -> RoutingState:
        return self  # a copied cache continues the same inputs; a kept state does not change

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """The mean of values (…, n) of a layer over the tokens that count of each input: (B, n)."""
        assert self.num_inputs is not None
        if self.num_candidates and values.ndim > 2:
            values = values[:, : -self.num_candidates]
        return mean_over_tokens(values, self.num_inputs, self.mask)


# -- the states of the calls that are in progress in this thread


def active_state(router: InputRouter) -> RoutingState | None:
    """The state of the innermost call in progress whose layers ask a router; None outside of calls."""
    for state in reversed(_active.get()):
        if state.router is router:
            return state
    return None


@contextmanager
def activate(state: RoutingState) -> Iterator[RoutingState]:
    """Make a state that of the call in progress inside the ``with`` block, however it ends."""
    token = _active.set((*_active.get(), state))
    try:
        yield state
    finally:
        _active.reset(token)


@dataclass
class Generation:
    """A call of ``generate`` in progress, which keeps the choice that its first call of the model makes."""

    router: InputRouter
    prompt_length: int | None  # tokens that are chosen by; None for an encoder-decoder
    state: RoutingState | None = None


_generations: ContextVar[tuple[Generation, ...]] = ContextVar("smile_generations", default=())


def active_generation(router: InputRouter) -> Generation | None:
    """The call of ``generate`` in progress in this thread; None outside of one."""
    return next((generation for generation in _generations.get() if generation.router is router), None)


@contextmanager
def generate_with(generation: Generation) -> Iterator[None]:
    """Make a call of ``generate`` the one in progress inside the ``with`` block, however it ends."""
    token = _generations.set((*_generations.get(), generation))
    try:
        yield
    finally:
        _generations.reset(token)


# -- states that outlast their call, with the object that continues its inputs


def keep(state: RoutingState, holder: Any) -> None:
    """Keep the decisions of a state with a cache, or with the output of an encoder."""
    if isinstance(holder, (list, tuple)):
        holder = next(iter(tensors_in(holder)), None)
    if isinstance(holder, Tensor):
        _kept_with_tensors[holder] = state
    elif holder is not None:
        setattr(holder, KEPT, state)


def kept_state(router: InputRouter, arguments: Mapping[str, Any]) -> RoutingState | None:
    """A copy of the state that is kept with the cache or the encoder's output in the arguments of a call.

    Raises:
        RuntimeError: A cache holds tokens whose experts this router has not chosen.
    """
    for name in CACHE_ARGUMENTS:
        cache = arguments.get(name)
        state = _state_of_holder(cache)
        if state is not None and state.router is router:
            return state.copy()
        if state is not None or _has_tokens(cache):
            raise RuntimeError(
                f"{name} holds tokens whose experts this model has not chosen; call the model with the whole input, or "
                "with a cache that an earlier call of it returned"
            )
    state = _state_of_holder(arguments.get("encoder_outputs"))
    return state.copy() if state is not None and state.router is router else None


def _state_of_holder(holder: Any) -> RoutingState | None:
    if isinstance(holder, (list, tuple)) or hasattr(holder, "last_hidden_state"):
        holder = next(iter(tensors_in(holder)), None)
    return _kept_with_tensors.get(holder) if isinstance(holder, Tensor) else getattr(holder, KEPT, None)


def _has_tokens(cache: Any) -> bool:
    if hasattr(cache, "get_seq_length"):
        return bool(cache.get_seq_length() > 0)
    return isinstance(cache, (list, tuple)) and len(cache) > 0


def caches_in(arguments: Mapping[str, Any], output: Any) -> list[Any]:
    """The caches in the arguments and in the output of a call."""
    found = [arguments.get(name) for name in CACHE_ARGUMENTS]
    if isinstance(output, Mapping):
        found += [output.get(name) for name in CACHE_ARGUMENTS]
    elif isinstance(output, tuple):
        found += [value for value in output if hasattr(value, "get_seq_length")]
    return [cache for cache in found if cache is not None and not isinstance(cache, Tensor)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors with at least one dimension in nested mappings and sequences."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


# -- tokens and inputs


def mean_over_tokens(values: Tensor, num_inputs: int, mask: Tensor | None) -> Tensor:
    """The mean of values (rows, …, n) over the tokens of each input: (num_inputs, n).

    Args:
        values: rows is a multiple of `num_inputs`, with the beams of an input next to each other.
        num_inputs: The number of inputs.
        mask: (num_inputs, tokens), bool: the tokens that count. None counts all.

    Raises:
        RuntimeError: rows is no multiple of `num_inputs`.
    """
    rows = values.shape[0]
    if not rows:
        return values.new_zeros(num_inputs, values.shape[-1])
    _check_rows(rows, num_inputs)
    values = values.reshape(rows, -1, values.shape[-1])
    if mask is not None and values.shape[1] == 1 and rows == mask.numel():  # tokens of all inputs in one dimension
        values = values.reshape(num_inputs, -1, values.shape[-1])
    if mask is None or mask.shape[1] != values.shape[1]:
        means = values.mean(dim=1)
    else:
        counted = repeat_for_rows(mask, values.shape[0]).to(values.device, values.dtype)[..., None]
        means = (values * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)
    return means.reshape(num_inputs, -1, means.shape[-1]).mean(dim=1)  # over the beams of an input


def repeat_for_rows(values: Tensor, rows: int) -> Tensor:
    """Values (B, …) of B inputs, repeated for the beams of each input: (rows, …).

    Raises RuntimeError if rows is not a multiple of B.
    """
    if rows == values.shape[0]:
        return values
    _check_rows(rows, values.shape[0])
    return values.repeat_interleave(rows // values.shape[0], dim=0)


def _check_rows(rows: int, num_inputs: int) -> None:
    if not num_inputs or rows % num_inputs:
        raise RuntimeError(f"leading dimension {rows} is not a multiple of the batch size {num_inputs}")


def log_energy_share(shares: Tensor) -> Tensor:
    """The logarithm of shares of energy, bounded below."""
    return torch.log(shares.clamp(min=MIN_ENERGY_SHARE))
