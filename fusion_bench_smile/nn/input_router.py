"""One choice of experts for each input of a model in all layers, instead of one for each token and layer.

With ``routing_scope="input"`` a first pass of the pretrained model alone scores each input, by the energy that the
router rows of each expert explain, as the mean over the first two thirds of the layers, where the pass ends. The
input's best `top_k` experts serve it in all layers of the second pass, with the softmax of their scores as weights.
Calibrated prototypes may take the place of the scores.

Inputs are routed independently: neither the other inputs of a batch nor their order matter. Padding does not count
where the call has an ``attention_mask``. While a model generates, the choice of the prompt is kept; that of an
encoder-decoder is made by its encoder. A layer whose tokens belong to no single input routes each token by itself; see
`attribution`.
"""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..config import SmileConfig
from .attribution import LayerInputs, find_token_layers, first_input, log_token_layers
from .energy import num_scored_rows
from .merged_weights import MergedWeights
from .prototypes import Prototypes
from .routed import RoutedLayer, routed_layers
from .routing_policy import choose_for_all_layers, observe_layer
from .routing_state import (
    CACHE_ARGUMENTS,
    RoutingState,
    activate,
    active_generation,
    active_state,
    caches_in,
    keep,
    kept_state,
    repeat_for_rows,
    tensors_in,
)  # fmt: skip
from .scoring import is_traced

ROUTER_NAME = "smile_router"  # the router's name as a submodule of the model
RECORDING = ("output_attentions", "output_hidden_states")
# the first pass has no cache and no loss, and computes the logits of the last token of the inputs
FIRST_PASS_ARGUMENTS = {
    **dict.fromkeys(CACHE_ARGUMENTS), "use_cache": False, "labels": None, **dict.fromkeys(RECORDING, False),
}  # fmt: skip
LOGITS = ("logits_to_keep", "num_logits_to_keep")  # the second in transformers 4.48

SCORED_SHARE = 2 / 3  # of the layers with a router, from the first on: the first pass ends there

Role = Literal["model", "encoder", "encoder_decoder"]  # of an entry point; the experts are chosen by the first two
Forward = Callable[..., Any]
ChoiceHook = Callable[[RoutingState], None]


class _FirstPassEnd(Exception):  # noqa: N818  it is no error
    """Ends the first pass of the pretrained model after the last layer that scores inputs."""


def can_be_interrupted(module: nn.Module) -> bool:
    """Whether the forward of a module may end early: no hook and no wrapper of a part waits for its end.

    transformers records attentions and hidden states by replacing methods until the end.
    """
    config = getattr(module, "config", None)
    records = any(getattr(config, option, False) for option in RECORDING)
    return not (is_traced() or records) and not any(
        part._forward_hooks or part._forward_pre_hooks or hasattr(part, "_hf_hook") or "Parallel" in type(part).__name__
        for part in module.modules()
    )


def num_scored(layers: int) -> int:
    """The number of layers, of those with a router, whose scores choose the experts of an input."""
    return math.ceil(SCORED_SHARE * layers)


class InputRouter(nn.Module):
    """The router that the routed layers of one model share where experts are chosen for whole inputs.

    T is the number of experts, B the number of inputs of a call. What a call decides is in its `RoutingState`, not in
    the router.
    """

    prototypes: Prototypes | None  # calibrated, their scores replace the experts'
    layers: tuple[RoutedLayer, ...]  # those with a router in the deciding module, in the order of the model
    token_layers: set[RoutedLayer]  # the layers whose tokens can't be attributed to inputs
    merged_weights: MergedWeights  # of a choice that holds for several calls

    def __init__(self, config: SmileConfig, experts: Sequence[str]) -> None:
        super().__init__()
        self.smile_config, self.experts = config, tuple(experts)
        self.prototypes = None
        self.layers = ()
        self.token_layers = set()
        self.merged_weights = MergedWeights()
        self._examined: set[nn.Module] = set()  # the entry points whose layers were examined for `token_layers`
        self._choice_hooks: OrderedDict[int, ChoiceHook] = OrderedDict()

    def register_choice_hook(self, hook: ChoiceHook) -> RemovableHandle:
        """Have ``hook(state)`` called at the end of every call of the model."""
        handle = RemovableHandle(self._choice_hooks)
        self._choice_hooks[handle.id] = hook
        return handle

    def forward(self, x: Any) -> Any:
        """The identity: a `torch.nn.Sequential` calls all its submodules, and the router may be one of them."""
        return x

    @property
    def scored_rows(self) -> int | None:
        """The number of router rows of each expert, at most, that score whole inputs; None is all."""
        return num_scored_rows(len(self.experts)) if self.prototypes is None else self.prototypes.rows

    # What follows is not compiled: a compiler traces wrongly what it keeps in the state.
    # -- the questions of the layers

    @torch.compiler.disable
    def state_for(self, layer: RoutedLayer) -> RoutingState | None:
        """The state of the call in progress; None if the layer routes each token by itself.

        Raises RuntimeError if a part of the model was called alone, which does not see whole inputs.
        """
        state = active_state(self)
        if state is None or state.num_inputs is None:
            raise RuntimeError(
                "routing_scope=input chooses experts for whole inputs, and a part of the model that does not "
                "see whole inputs was called (in a backward pass: by gradient checkpointing): call the model itself, "
                "or name the experts by `with use_experts(model, weights)`"
            )
        has_one_choice = state.choice is not None and state.num_inputs == 1 and state.is_given
        return None if layer in self.token_layers and not (state.in_first_pass or has_one_choice) else state

    @torch.compiler.disable
    def weights(self, state: RoutingState, layer: RoutedLayer, x: Tensor) -> Tensor | None:
        """The weight of each expert for each input of x: (rows, T). None in the first pass, which scores the layer."""
        if state.inputs_of_layers is not None:
            state.inputs_of_layers.setdefault(layer, []).append(x.detach())
        elif layer in state.awaited:
            observe_layer(state, layer, x, self.scored_rows)
            state.awaited.remove(layer)
            if not state.awaited and state.can_end_early:
                raise _FirstPassEnd
        if state.in_first_pass or state.choice is None:
            return None
        layer.call_routing_hooks(x, cast(Tensor, state.scores))
        return repeat_for_rows(state.choice, x.shape[0])

    # -- the calls of the model; see `attachment`

    @torch.compiler.disable
    def run(
        self, module: nn.Module, role: Role, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the forward of an entry point: as the outermost call of the model, or inside of another one.

        Raises:
            RuntimeError: The experts can't be chosen; the message says why.
        """
        state = active_state(self)
        if state is not None and (state.num_inputs is not None or role == "encoder_decoder"):
            return forward(*args, **kwargs)
        call = _signature(type(module).forward).bind_partial(*args, **kwargs)
        arguments = named_arguments(call)
        if state is not None:
            return self._enter(state, module, role, forward, call, arguments)
        generation = active_generation(self)
        held = None if generation is None or generation.state is None else generation.state.copy()
        continued = held or kept_state(self, arguments)
        state = continued or RoutingState(router=self)
        if continued is not None and continued.one_choice is not None:
            state.merges = self.merged_weights.announce(continued.one_choice)
        with activate(state):
            output = self._enter(state, module, role, forward, call, arguments)
            for hook in list(self._choice_hooks.values()):
                hook(state)
        for cache in caches_in(arguments, output):
            keep(state.copy(), cache)
        if generation is not None:
            generation.state = state.copy()
        return output

    def _enter(
        self, state: RoutingState, module: nn.Module, role: Role, forward: Forward, call: inspect.BoundArguments,
        arguments: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        """Run an entry point, before which the experts are chosen if it is the one that decides."""
        if state.num_inputs is None and role != "encoder_decoder":
            self._begin(state, module, forward, call, arguments)
        elif role == "encoder_decoder" and arguments.get("encoder_outputs") is not None and state.num_inputs is None:
            raise RuntimeError("encoder_outputs are not those that the encoder of this model returned: pass these")
        output = forward(*call.args, **call.kwargs)
        if role == "encoder":
            keep(state.copy(), output[0])
        return output

    def _begin(
        self, state: RoutingState, module: nn.Module, forward: Forward, call: inspect.BoundArguments,
        arguments: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Take the inputs of a call, and choose their experts if they are chosen before the first layer."""
        generation = active_generation(self)
        if torch.is_grad_enabled() and getattr(module, "is_gradient_checkpointing", False):
            raise RuntimeError(
                "gradient checkpointing computes layers outside of the call that chose their experts, which "
                "routing_scope=input does not support: call gradient_checkpointing_disable(), or use "
                "routing_scope=token"
            )
        if self.smile_config.refuse_unknown and self.prototypes is None:
            raise RuntimeError("refuse_unknown=true needs calibrated prototypes: calibrate the model first")
        take_inputs(state, module, arguments, None if generation is None else generation.prompt_length)
        if module not in self._examined and is_traced():
            raise RuntimeError(
                "call the model once before it is compiled, exported or traced: the first call finds the layers whose "
                "tokens can't be attributed to inputs"
            )
        if module not in self._examined and state.num_inputs:
            self._examine(module, forward, call, state.num_inputs)
        state.collects_features = self.prototypes is not None
        self._score_inputs(state, module, forward, call)

    def _score_inputs(
        self, state: RoutingState, module: nn.Module, forward: Forward, call: inspect.BoundArguments
    ) -> None:  # fmt: skip
        """Score the inputs of a call in a first pass, up to the last layer that is needed, and choose their experts."""
        state.awaited = set(self.scored_layers())
        state.can_end_early = can_be_interrupted(module)
        state.is_trained = torch.is_grad_enabled()
        self._run_first_pass(state, forward, call)
        choose_for_all_layers(state, self.smile_config, len(self.experts), self.prototypes)

    def scored_layers(self) -> list[RoutedLayer]:
        """The layers that score inputs: the first two thirds, or as many as the prototypes were fitted to."""
        layers = [layer for layer in self.layers if layer not in self.token_layers]
        if self.prototypes is None:
            return layers[: num_scored(len(layers))]
        return layers[: len(self.prototypes.scale) // (2 * len(self.experts))]

    @torch.no_grad()
    def _run_first_pass(self, state: RoutingState, forward: Forward, call: inspect.BoundArguments) -> None:
        call = inspect.BoundArguments(call.signature, call.arguments.copy())
        changed = FIRST_PASS_ARGUMENTS | dict.fromkeys(LOGITS, state.num_candidates + 1)
        call.arguments.update({name: changed[name] for name in changed.keys() & call.signature.parameters.keys()})
        for name, parameter in call.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD and name in call.arguments:
                given = call.arguments[name]
                call.arguments[name] = given | {key: changed[key] for key in changed.keys() & given.keys()}
        state.in_first_pass = True
        with suppress(_FirstPassEnd):
            forward(*call.args, **call.kwargs)
        state.in_first_pass = False

    def _examine(self, module: nn.Module, forward: Forward, call: inspect.BoundArguments, num_inputs: int) -> None:
        """Find the layers whose tokens can't be attributed to inputs, by two passes of the first input."""
        alone: LayerInputs = {}
        in_pair: LayerInputs = {}
        for number, record in ((1, alone), (2, in_pair)):
            arguments = first_input(dict(call.arguments), num_inputs, repeated=number == 2)
            with activate(RoutingState(router=self, num_inputs=number, inputs_of_layers=record)) as state:
                self._run_first_pass(state, forward, inspect.BoundArguments(call.signature, OrderedDict(arguments)))
        found = find_token_layers(alone, in_pair, compares_values=not module.training) - self.token_layers
        self._examined.add(module)
        self.token_layers |= found
        if found:
            layers = routed_layers(module)
            log_token_layers([name for name, layer in layers.items() if layer in found], len(layers))

    def observe(self, module: nn.Module, arguments: Mapping[str, Any], collects_features: bool = False) -> RoutingState:
        """The state after the first pass of the inputs in the keyword arguments of an entry point that decides.

        It has ``scores`` (B, T), or ``input_features`` (B, 2·T·layers): the logarithms of energy shares that prototypes
        are fitted to.
        """
        state = RoutingState(router=self, collects_features=collects_features)
        call = _signature(type(module).forward).bind_partial(**arguments)
        with activate(state):
            take_inputs(state, module, named_arguments(call), None)
            self._score_inputs(state, module, module.forward, call)
        return state

    def choose(self, module: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """The weights (B, T) for the inputs of an entry point that decides."""
        return cast(Tensor, self.observe(module, arguments, collects_features=self.prototypes is not None).choice)


def take_inputs(
    state: RoutingState, module: nn.Module, arguments: Mapping[str, Any], prompt_length: int | None
) -> None:
    """Note the number of inputs of a call, and which of their tokens count: no padding, and nothing after a prompt.

    Raises:
        RuntimeError: There is no tensor among the arguments.
    """
    main_input = arguments.get(getattr(module, "main_input_name", "input_ids"))
    inputs = main_input if isinstance(main_input, Tensor) else next(tensors_in(arguments), None)
    if inputs is None:
        raise RuntimeError(f"{type(module).__name__} was called without a tensor: there are no inputs to choose for")
    state.num_inputs = inputs.shape[0]
    mask = arguments.get("attention_mask")
    state.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if prompt_length is not None and inputs.ndim > 1 and inputs.shape[1] > prompt_length:
        state.num_candidates = inputs.shape[1] - prompt_length
        state.mask = None if state.mask is None else state.mask[:, :prompt_length]


def named_arguments(call: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of a call by name, with those that the signature collects in a ``**kwargs``."""
    arguments = dict(call.arguments)
    for name, parameter in call.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


@lru_cache(maxsize=256)
def _signature(method: Callable[..., Any]) -> inspect.Signature:
    """The signature of a method, without ``self``."""
    parameters = list(inspect.signature(method).parameters.values())
    return inspect.Signature(parameters[1:])
