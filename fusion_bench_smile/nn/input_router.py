"""One choice of experts for each input of a model, instead of one for each token and layer (``routing_scope``).

- ``sequence``: one choice in each layer, by the mean of the tokens' scores;
- ``global``: one choice in each layer, by the scores of all layers so far;
- ``two_pass``: one choice for all layers, by the scores of all layers in a first pass of the pretrained model alone.
  Norms and embeddings can then be the experts' too.

Inputs are routed independently: neither the other inputs of a batch nor their order matter. Padding does not count
where the call has an ``attention_mask``. While a model generates, the choice of the prompt is kept; that of an
encoder-decoder is made by its encoder.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import RoutingScope, SmileConfig
from .execution import InputGroups
from .prototypes import Prototypes
from .routed import RoutedLayer
from .routing_policy import choose_for_all_layers, choose_in_layer, group_by_expert, observe_layer
from .routing_state import RoutingState, repeat_for_rows

ROUTER_NAME = "smile_router"  # the router's name as a submodule of the model
# The first pass neither reads nor writes a cache, and computes one logit. transformers 4.48 has the last name.
FIRST_PASS_ARGUMENTS = {"past_key_values": None, "use_cache": False, "logits_to_keep": 1, "num_logits_to_keep": 1}


class InputRouter(nn.Module):
    """The router that the routed layers of one model share where experts are chosen for whole inputs.

    T is the number of experts, B the number of inputs of a call. ``config.routing_scope`` is not ``token``.

    Attributes:
        prototypes: Calibrated prototypes, whose scores replace the experts' (``two_pass`` only), or None.
        baseline: (2, T), mean and deviation of the experts' scores of random inputs, or None.
        own: Module/parameter → the experts' differences to the pretrained parameter (T, …); see `expert_parameters`.
            Checkpoints have this name.
        forced: The weight of each expert for all inputs (T,), or for each (B, T); it overrides the scores.
        state: The state of the current call.
    """

    prototypes: Prototypes | None
    baseline: Tensor | None

    def __init__(self, config: SmileConfig, experts: Sequence[str]) -> None:
        super().__init__()
        self.smile_config, self.experts = config, tuple(experts)
        self.forced: Tensor | None = None
        self.own = nn.ParameterDict()
        self.prototypes = None
        self.register_parameter("baseline", None)
        self.state = RoutingState()

    @property
    def scope(self) -> RoutingScope:
        """The routing scope."""
        return self.smile_config.routing_scope

    @property
    def scores(self) -> Tensor | None:
        """The scores that the last choice rests on, (B, T)."""
        return self.state.scores

    @property
    def choice(self) -> Tensor | None:
        """The weight of each expert for each of the last inputs, (B, T)."""
        return self.state.choice

    def set_baseline(self, values: Tensor) -> None:
        """Standardise scores by mean and deviation, (2, T)."""
        self.baseline = nn.Parameter(values, requires_grad=False)

    def forward(self, x: Any) -> Any:
        """The identity: a `torch.nn.Sequential` calls all its submodules, and the router may be one of them."""
        return x

    # -- the questions of the layers

    def weights(self, layer: RoutedLayer, x: Tensor, output: Tensor) -> Tensor | None:
        """The weight of each expert for each input of x: (rows, T). None in the first pass.

        Raises RuntimeError if a part of the model was called alone, which does not see whole inputs.
        """
        if not self.state.num_inputs:
            raise RuntimeError(
                f"routing_scope={self.scope} chooses experts for whole inputs, and a part of the model that does not "
                "see whole inputs was called: call the model itself"
            )
        if self.state.in_first_pass:
            observe_layer(self.state, self.smile_config, layer, x, output)
            return None
        if self.scope != "two_pass" and self.forced is None:
            weights = choose_in_layer(self.state, self.smile_config, len(self.experts), layer, x, output)
            return repeat_for_rows(weights, len(x))
        return self.weights_before_layer(layer, x)

    def weights_before_layer(self, layer: RoutedLayer, x: Tensor) -> Tensor | None:
        """The weight of each expert for each input of x, (rows, T); None if it is not known before the layer runs."""
        if not self.state.in_first_pass and self.choice is not None:
            layer.call_routing_hooks(x, cast(Tensor, self.scores))
        return self.chosen_weights(len(x))

    def chosen_weights(self, rows: int) -> Tensor | None:
        """The weights of a choice for all layers, repeated for the beams of each input: (rows, T). None before it."""
        if self.state.in_first_pass or self.choice is None:
            return None
        return repeat_for_rows(self.choice, rows)

    def group_inputs(self, weights: Tensor) -> InputGroups | None:
        """The inputs grouped by expert. With one choice for all layers they are grouped once."""
        if torch.compiler.is_compiling():
            return None
        if self.scope != "two_pass" and self.forced is None:  # an accelerator would synchronise in every layer
            return group_by_expert(weights) if weights.device.type == "cpu" else None
        if self.state.groups is None or self.state.groups.num_inputs != len(weights):
            self.state.groups = group_by_expert(weights)
        return self.state.groups

    # -- the calls of the model; `attachment.attach_router` registers the first two as hooks

    def begin_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin the call of an entry point: new inputs, or the continuation of a generation."""
        if self.state.depth:  # an entry point inside another one
            self.state.depth += 1
            return
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        arguments = {**call.arguments, **call.arguments.get("kwargs", {})}
        if not (self.state.num_inputs and _continues(arguments.get("past_key_values"))):
            self.state = RoutingState.of_call(arguments, collects_features=self.prototypes is not None)
            if self.forced is not None:
                self.state.scores = self.state.choice = self.forced.expand(self.state.num_inputs, -1)
            elif self.smile_config.refuse_unknown and self.prototypes is None:
                raise RuntimeError("refuse_unknown=true needs calibrated prototypes: calibrate the model first")
            elif self.scope == "two_pass":
                self._run_first_pass(module, call)
        self.state.depth = 1

    def end_call(self, *_: Any) -> None:
        """End the call of an entry point."""
        self.state.depth = max(0, self.state.depth - 1)

    @torch.no_grad()
    def _run_first_pass(self, module: nn.Module, call: inspect.BoundArguments) -> None:
        for name in FIRST_PASS_ARGUMENTS.keys() & call.signature.parameters.keys():
            call.arguments[name] = FIRST_PASS_ARGUMENTS[name]
        self.state.in_first_pass, self.state.depth = True, 1
        try:
            module.forward(*call.args, **call.kwargs)
        except BaseException:
            self.state = RoutingState()
            raise
        self.state.in_first_pass = False
        choose_for_all_layers(self.state, self.smile_config, len(self.experts), self.prototypes, self.baseline)

    def scores_of(self, module: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """The ``two_pass`` scores of the inputs in the keyword arguments of an entry point: (B, T)."""
        return cast(Tensor, self._observe_inputs(module, arguments, collects_features=False).scores)

    def features_of(self, module: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """The features of the same, which prototypes are fitted to: (B, 2·T·layers), logarithms of energy shares."""
        return self._observe_inputs(module, arguments, collects_features=True).input_features

    def _observe_inputs(self, module: nn.Module, arguments: Mapping[str, Any], collects_features: bool) -> RoutingState:
        self.state = RoutingState.of_call(arguments, collects_features)
        self._run_first_pass(module, inspect.signature(module.forward).bind_partial(**arguments))
        self.state.depth = 0
        return self.state


def _continues(cache: Any) -> bool:
    """Whether a cache holds tokens, so that the call continues inputs that were routed before."""
    if cache is None:
        return False
    return cache.get_seq_length() > 0 if hasattr(cache, "get_seq_length") else len(cache) > 0
