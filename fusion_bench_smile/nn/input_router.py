"""One choice of experts for each input of a model, instead of one for each token and layer (``routing_scope``).

- ``sequence``: one choice in each layer, by the mean of the tokens' scores;
- ``global``: one choice in each layer, by the scores of all layers so far;
- ``two_pass``: one choice for all layers, by the scores of all layers in a first pass of the pretrained model alone.
  Norms and embeddings can then be the experts' too.

Inputs are routed independently: neither the other inputs of a batch nor their order matter. Padding does not count
where the call has an ``attention_mask``. While a model generates, the choice of the prompt is kept; that of an
encoder-decoder is made by its encoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import RoutingScope, SmileConfig
from .execution import InputGroups
from .prototypes import Prototypes
from .routed import RoutedLayer
from .routing_state import RoutingState, log_energy_share, repeat_for_rows
from .scoring import ENERGY_SCORES, router_scores, routing_features, routing_weights

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

    # -- the questions of the layers; see `routed.InputRouting`

    def weights(self, layer: RoutedLayer, x: Tensor, output: Tensor) -> Tensor | None:
        """The weight of each expert for each input of x: (rows, T). None in the first pass.

        Raises:
            RuntimeError: A part of the model was called alone, which does not see whole inputs.
        """
        if not self.state.num_inputs:
            raise RuntimeError(
                f"routing_scope={self.scope} chooses experts for whole inputs, and a part of the model that does not "
                "see whole inputs was called: call the model itself"
            )
        if self.state.in_first_pass:
            self._observe_layer(layer, x, output)
            return None
        if self.scope != "two_pass" and self.forced is None:
            return repeat_for_rows(self._choose_in_layer(layer, x, output), len(x))
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

    # -- the policy

    def _choose_in_layer(self, layer: RoutedLayer, x: Tensor, output: Tensor) -> Tensor:
        """The weights of ``sequence`` and ``global`` in one layer, (B, T), kept until the next inputs."""
        state = self.state
        if layer in state.layer_weights:
            return state.layer_weights[layer]
        token_scores = router_scores(layer, x, output)
        if token_scores is not None:
            scores = self._input_scores(layer, token_scores)
            if self.scope == "global":
                scores = state.add_scores(scores, layer.smile_config.routing_score in ENERGY_SCORES)
            layer.call_routing_hooks(x, scores)
        elif self.scope == "global" and state.scores is not None:
            scores = state.scores  # a layer without a router follows the layers before it
        else:
            scores = x.new_zeros(state.num_inputs, len(self.experts))
        state.scores = scores
        state.layer_weights[layer] = routing_weights(scores, self.smile_config.top_k)
        return state.layer_weights[layer]

    def _observe_layer(self, layer: RoutedLayer, x: Tensor, output: Tensor) -> None:
        """Score a layer in the first pass, or collect its features."""
        state = self.state
        token_values = routing_features(layer, x) if state.collects_features else router_scores(layer, x, output)
        if token_values is None:
            return
        if state.collects_features:
            state.features.append(log_energy_share(state.mean_over_tokens(token_values)).float())
        else:
            is_energy_score = layer.smile_config.routing_score in ENERGY_SCORES
            state.scores = state.add_scores(self._input_scores(layer, token_values), is_energy_score)

    def _input_scores(self, layer: RoutedLayer, token_scores: Tensor) -> Tensor:
        """The scores of inputs from those of their tokens: (B, T)."""
        scores = self.state.mean_over_tokens(token_scores)
        return log_energy_share(scores) if layer.smile_config.routing_score in ENERGY_SCORES else scores

    def _choose_for_all_layers(self) -> None:
        state = self.state
        prototypes = self.prototypes if state.features else None
        if prototypes is not None:
            state.scores = prototypes.scores(self.features)
        elif state.scores is None:  # no layer has a router
            state.scores = torch.zeros(state.num_inputs, len(self.experts))
        elif self.baseline is not None:
            state.scores = (state.scores - self.baseline[0]) / self.baseline[1]
        state.choice = routing_weights(state.scores, self.smile_config.top_k)
        if self.smile_config.refuse_unknown and prototypes is not None:
            state.choice = state.choice * prototypes.known(self.features)[:, None]

    # -- the calls of the model; `attachment.attach_router` registers the first two as hooks

    def begin_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin the call of an entry point: new inputs, or the continuation of a generation."""
        if self.state.depth:  # an entry point inside another one
            self.state.depth += 1
            return
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        arguments = {**call.arguments, **call.arguments.get("kwargs", {})}
        if not (self.state.num_inputs and _continues(arguments.get("past_key_values"))):
            self._begin_inputs(module, call, arguments)
        self.state.depth = 1

    def end_call(self, *_: Any) -> None:
        """End the call of an entry point."""
        self.state.depth = max(0, self.state.depth - 1)

    def _begin_inputs(self, module: nn.Module, call: inspect.BoundArguments, arguments: Mapping[str, Any]) -> None:
        self.state = self._new_state(arguments, collects_features=self.prototypes is not None)
        if self.forced is not None:
            self.state.scores = self.state.choice = self.forced.expand(self.state.num_inputs, -1)
        elif self.smile_config.refuse_unknown and self.prototypes is None:
            raise RuntimeError("refuse_unknown=true needs calibrated prototypes: calibrate the model first")
        elif self.scope == "two_pass":
            self._run_first_pass(module, call)

    @staticmethod
    def _new_state(arguments: Mapping[str, Any], collects_features: bool) -> RoutingState:
        mask = arguments.get("attention_mask")
        return RoutingState(
            num_inputs=next(len(v) for v in arguments.values() if isinstance(v, Tensor) and v.ndim),
            mask=mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            collects_features=collects_features,
        )

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
        self._choose_for_all_layers()

    def scores_of(self, module: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """The ``two_pass`` scores of the inputs in the keyword arguments of an entry point: (B, T)."""
        self._observe_inputs(module, arguments, collects_features=False)
        return cast(Tensor, self.scores)

    def features_of(self, module: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """The features of the same, which prototypes are fitted to: (B, 2·T·layers), logarithms of energy shares."""
        self._observe_inputs(module, arguments, collects_features=True)
        return self.features

    def _observe_inputs(self, module: nn.Module, arguments: Mapping[str, Any], collects_features: bool) -> None:
        self.state = self._new_state(arguments, collects_features)
        self._run_first_pass(module, inspect.signature(module.forward).bind_partial(**arguments))
        self.state.depth = 0

    @property
    def features(self) -> Tensor:
        """The features of the last inputs: (B, 2·T·layers)."""
        return torch.cat(self.state.features, dim=-1)


def group_by_expert(weights: Tensor) -> InputGroups:
    """Group inputs by the experts that have a weight above zero for them, from weights (B, T)."""
    members = [(expert, weights[:, expert].nonzero()[:, 0]) for expert in range(weights.shape[1])]
    return InputGroups(len(weights), [(expert, inputs) for expert, inputs in members if len(inputs)])


def _continues(cache: Any) -> bool:
    """Whether a cache holds tokens, so that the call continues inputs that were routed before."""
    if cache is None:
        return False
    return cache.get_seq_length() > 0 if hasattr(cache, "get_seq_length") else len(cache) > 0
