"""One choice of experts for each input of a model, instead of one for each token and layer. Imports torch alone.

The paper's router decides token by token, layer by layer. Here all tokens of an input share a decision:

- ``sequence``: one for each layer, by the mean of the tokens' scores;
- ``global``: one for each layer, by the scores of all layers so far;
- ``two_pass``: one for all layers. The pretrained model alone sees the input first, and the scores of all its layers
  decide; then the experts are used. What else an expert changed, norms and embeddings, can be its own then too.

The scores of several layers are averaged; those that are shares of the energy are multiplied (their
logarithms are added), as what independent witnesses say.

Each input is decided for on its own: which others are in its batch, and in what order, doesn't matter. Padding doesn't
count, where the model gets an ``attention_mask``. While a model generates, the choice is made at the prompt and kept;
an encoder-decoder's is made by its encoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .layers import SHARES_OF_ENERGY, Groups, Routed
from .prototypes import Prototypes

Scope = Literal["token", "sequence", "global", "two_pass"]
ROUTER = "smile_router"
SMALLEST = 1e-12  # share of the energy


class InputRouter(nn.Module):
    """What the routed layers of one model share while inputs pass: their scores so far, and the decision.

    Attributes:
        scope: see above; not ``token``, which needs nothing shared.
        experts: how many there are.
        top_k: experts kept for each input.
        refuse: inputs that are far from all prototypes get no expert, but the pretrained model.
        prototypes: if there are some, they decide instead of the scores (``two_pass`` alone).
        baseline: (2, T), mean and deviation of the scores of random inputs, which each expert's are compared with;
            None where they decide as they are.
        forced: the weight of each expert for all inputs (T,), or for each (B, T), instead of what scores say; see
            `oracle.as_expert`.
        own: what experts own beside their layers, module/parameter → differences (T, …); see `own`.
        scores: what decided for the last inputs, (B, T).
        choice: the weight of each expert for each of the last inputs, (B, T).
    """

    prototypes: Prototypes | None
    baseline: Tensor | None

    def __init__(self, scope: Scope, experts: int, top_k: int, refuse: bool = False) -> None:
        super().__init__()
        self.scope, self.experts, self.top_k, self.refuse = scope, experts, top_k, refuse
        self.forced: Tensor | None = None
        self.own = nn.ParameterDict()
        self.prototypes = None
        self.register_parameter("baseline", None)
        self._forget()

    def set_baseline(self, values: Tensor) -> None:
        """Compare scores with these: mean and deviation, (2, T)."""
        self.baseline = nn.Parameter(values, requires_grad=False)

    def _forget(self) -> None:
        self.scores: Tensor | None = None
        self.choice: Tensor | None = None
        self._depth = 0  # of calls within calls
        self._inputs = 0
        self._mask: Tensor | None = None
        self._scoring = False
        self._describing = self.prototypes is not None
        self._total: Tensor | None = None
        self._layers = 0
        self._features: list[Tensor] = []
        self._kept: dict[Routed, Tensor] = {}
        self._groups: Groups | None = None

    def forward(self, x: Any) -> Any:
        """Nothing: a `torch.nn.Sequential` runs whatever it holds, also this."""
        return x

    # -- what the layers ask

    def weights(self, layer: Routed, x: Tensor, out: Tensor) -> Tensor | None:
        """See `layers.InputChoice`.

        Raises:
            RuntimeError: if a part of the model was called alone, which can't know what belongs to one input.
        """
        if not self._inputs:
            raise RuntimeError(
                f"routing_scope={self.scope} chooses for whole inputs, and a part of the model was called that doesn't "
                "see them: call the model itself"
            )
        if self._scoring:
            self._add(layer, x, out)
            return None
        if self.scope != "two_pass" and self.forced is None:
            return self._fitting(self._of_layer(layer, x, out), len(x))
        return self.known(layer, len(x))

    def known(self, layer: Routed, rows: int) -> Tensor | None:
        """See `layers.InputChoice`."""
        if layer.see is not None and not self._scoring and self.choice is not None:
            scores = cast(Tensor, self.scores)
            layer.see(scores, *layer.chosen(scores))
        return self.decided(rows)

    def decided(self, rows: int) -> Tensor | None:
        """In ``two_pass``: the weights for so many rows, (rows, T), several for an input's beams; None before."""
        return None if self._scoring or self.choice is None else self._fitting(self.choice, rows)

    def groups(self, weights: Tensor) -> Groups | None:
        """See `layers.InputChoice`. In ``two_pass`` they are found once for all layers."""
        if torch.compiler.is_compiling():
            return None
        if self.scope != "two_pass" and self.forced is None:  # a wait in every layer, on an accelerator
            return _groups(weights) if weights.device.type == "cpu" else None
        if self._groups is None or self._groups[0] != len(weights):
            self._groups = _groups(weights)
        return self._groups

    @property
    def inputs(self) -> int:
        """How many the last call had; 0 before the first."""
        return self._inputs

    def _fitting(self, weights: Tensor, rows: int) -> Tensor:
        if rows % len(weights):
            raise RuntimeError(f"the experts were chosen for {len(weights)} inputs, and a layer got {rows} rows")
        return weights if rows == len(weights) else weights.repeat_interleave(rows // len(weights), dim=0)

    def _of_layer(self, layer: Routed, x: Tensor, out: Tensor) -> Tensor:
        if layer in self._kept:
            return self._kept[layer]
        of_tokens = layer.scores(x, out)
        scores = None if of_tokens is None else self._of_inputs(layer, of_tokens)
        if scores is None:  # without a router: what the others say, if they are heard
            scores = self.scores if self.scope == "global" else None
            scores = x.new_zeros(self._inputs, self.experts) if scores is None else scores
        elif self.scope == "global":
            scores = self._with_others(scores, layer.layout.score in SHARES_OF_ENERGY)
        self.scores, self._kept[layer] = scores, shares(scores, self.top_k)
        if layer.see is not None and of_tokens is not None:
            layer.see(scores.detach(), *layer.chosen(scores.detach()))
        return self._kept[layer]

    def _add(self, layer: Routed, x: Tensor, out: Tensor) -> None:
        of_tokens = layer.scores(x, out) if not self._describing else layer.energies(x)
        if of_tokens is None:
            return
        if not self._describing:
            self.scores = self._with_others(self._of_inputs(layer, of_tokens), layer.layout.score in SHARES_OF_ENERGY)
        else:
            self._features.append(self._mean(of_tokens).clamp(min=SMALLEST).log().float())

    def _of_inputs(self, layer: Routed, of_tokens: Tensor) -> Tensor:
        """Of the tokens' scores, the inputs': (B, T)."""
        scores = self._mean(of_tokens)
        return scores.clamp(min=SMALLEST).log() if layer.layout.score in SHARES_OF_ENERGY else scores

    def _with_others(self, scores: Tensor, relative: bool) -> Tensor:
        """The scores of all layers so far."""
        self._total = scores if self._total is None else self._total + scores
        self._layers += 1
        return self._total if relative else self._total / self._layers

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over each input's tokens but padding: (…, n) → (B, n)."""
        rows, mask = len(values), self._mask
        if rows % self._inputs:
            raise RuntimeError(f"a layer got {rows} rows for {self._inputs} inputs: which are whose?")
        values = values.reshape(rows, -1, values.shape[-1])
        if mask is not None and values.shape[1] == 1 and rows == mask.numel():  # tokens that aren't apart by input
            values = values.reshape(self._inputs, -1, values.shape[-1])
        if mask is None or mask.shape[1] != values.shape[1]:
            means = values.mean(dim=1)
        else:
            counts = self._fitting(mask, len(values)).to(values.device, values.dtype)[..., None]
            means = (values * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)
        return means.reshape(self._inputs, -1, means.shape[-1]).mean(dim=1)  # over an input's beams

    # -- what happens around a call of the model

    def attach(self, model: nn.Module) -> None:
        """Have this router decide for all routed layers of `model`; it is the submodule ``smile_router`` then."""
        for layer in model.modules():
            if isinstance(layer, Routed):
                layer.__dict__["input_choice"] = self  # not as a submodule of each
        for module in entrances(model):
            module.register_forward_pre_hook(self._begin, with_kwargs=True)
            module.register_forward_hook(self._end, always_call=True)
        setattr(model, ROUTER, self)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._depth:  # a part of the model: the whole has begun
            self._depth += 1
            return
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        given = {**call.arguments, **call.arguments.get("kwargs", {})}
        if not (self._inputs and _goes_on(given.get("past_key_values"))):
            self._forget()
            self._inputs, self._mask = _count(given), _mask(given.get("attention_mask"))
            if self.forced is not None:
                self.scores = self.choice = self.forced.expand(self._inputs, -1)
            elif self.refuse and self.prototypes is None:
                raise RuntimeError("refuse_unknown=true needs to know what is known: calibrate the model first")
            elif self.scope == "two_pass":
                self.score(module, call)
        self._depth = 1

    def _end(self, *_: Any) -> None:
        self._depth = max(0, self._depth - 1)

    def scores_of(self, module: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The scores of inputs, keyword arguments of an entrance of the model: (B, T). Only in ``two_pass``."""
        self._look_at(module, inputs, describing=False)
        return cast(Tensor, self.scores)

    def features_of(self, module: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """What prototypes know inputs by: (B, 2·T·layers), logarithms of shares of energy."""
        self._look_at(module, inputs, describing=True)
        return self.features

    def _look_at(self, module: nn.Module, inputs: Mapping[str, Any], describing: bool) -> None:
        self._forget()
        self._inputs, self._mask, self._describing = _count(inputs), _mask(inputs.get("attention_mask")), describing
        self.score(module, inspect.signature(module.forward).bind_partial(**inputs))
        self._depth = 0

    @torch.no_grad()
    def score(self, module: nn.Module, call: inspect.BoundArguments) -> None:
        """Have the pretrained model alone see the inputs, and decide."""
        # what a cache holds is seen once; a prompt's logits are for its last token, whoever asks
        alone = {"past_key_values": None, "use_cache": False, "logits_to_keep": 1, "num_logits_to_keep": 1}
        for name in alone.keys() & call.signature.parameters.keys():  # transformers 4.48 has the second name
            call.arguments[name] = alone[name]
        self._scoring, self._depth = True, 1
        try:
            module.forward(*call.args, **call.kwargs)
        except BaseException:
            self._forget()
            raise
        self._scoring = False
        self._decide()

    def _decide(self) -> None:
        prototypes = self.prototypes if self._features else None
        if prototypes is not None:
            self.scores = prototypes.scores(self.features)
        elif self.scores is None:  # no layer has a router
            self.scores = torch.zeros(self._inputs, self.experts)
        elif self.baseline is not None:
            self.scores = (self.scores - self.baseline[0]) / self.baseline[1]
        self.choice = shares(self.scores, self.top_k)
        if self.refuse and prototypes is not None:
            self.choice = self.choice * prototypes.known(self.features)[:, None]

    @property
    def features(self) -> Tensor:
        """Of the last inputs, what prototypes know them by: (B, 2·T·layers)."""
        return torch.cat(self._features, dim=-1)


def shares(scores: Tensor, top_k: int) -> Tensor:
    """The weight of each expert where they have these scores: both (…, T), at most `top_k` weights not zero."""
    kept, chosen = scores.topk(top_k, dim=-1)
    return torch.zeros_like(scores).scatter(-1, chosen, kept.softmax(dim=-1))


def _groups(weights: Tensor) -> Groups:
    used = [(expert, weights[:, expert].nonzero()[:, 0]) for expert in range(weights.shape[1])]
    return len(weights), [(expert, inputs) for expert, inputs in used if len(inputs)]


def detach(model: nn.Module) -> None:
    """Take the router of `model` away; its layers have none then."""
    for module in model.modules():
        module.__dict__.pop("input_choice", None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), InputRouter):
                    del hooks[key]
    model._modules.pop(ROUTER, None)


def entrances(model: nn.Module) -> list[nn.Module]:
    """The modules through which inputs come in: the model, or an encoder-decoder's encoder, and what it wraps.

    Some callers use only what is wrapped, e.g. the vision model of a vision tower.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, Routed)]
    start, prefix = model, ""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = model.get_encoder()  # type: ignore[operator]
        name = next(name for name, module in model.named_modules() if module is encoder)
        if any(layer.startswith(f"{name}.") for layer in layers):
            start, prefix = encoder, f"{name}."
    inside = [layer.removeprefix(prefix).split(".")[:-1] for layer in layers if layer.startswith(prefix)]
    found, current = [start], start
    for parts in zip(*inside, strict=False):
        if len(set(parts)) > 1:
            break
        current = current.get_submodule(parts[0])
        if type(current).forward is not nn.Module.forward:  # a list has none
            found.append(current)
    return found


def _count(given: Mapping[str, Any]) -> int:
    return next(len(value) for value in given.values() if isinstance(value, Tensor) and value.ndim)


def _mask(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _goes_on(cache: Any) -> bool:
    """Whether a call continues an input that was seen: its cache is not empty."""
    if cache is None:
        return False
    return cache.get_seq_length() > 0 if hasattr(cache, "get_seq_length") else len(cache) > 0
