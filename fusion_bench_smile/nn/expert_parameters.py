"""Parameters of the experts outside the routed layers: norms and embeddings.

With one choice for a whole input that is known before its first layer (``two_pass``), norms and embeddings can be those
of the chosen experts. The router stores the differences (T, …) to the pretrained parameters, and forward hooks add
them. T is the number of experts, B the number of inputs.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import ExpertParameters
from .execution import InputGroups
from .input_router import InputRouter
from .routing_state import active_state

NORM_TYPES = (nn.LayerNorm, nn.RMSNorm)
NORM_SUFFIXES = ("LayerNorm", "RMSNorm")  # of classes that transformers defines for each architecture
EMBEDDING_SUFFIXES = ("ScaledWordEmbedding", "LearnedPositionalEmbedding")  # of subclasses, linear in their weight


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm or RMS norm with a scale, and at most a shift, over the last dimension."""
    if not (isinstance(module, NORM_TYPES) or type(module).__name__.endswith(NORM_SUFFIXES)):
        return False
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    has_scale = parameters.keys() <= {"weight", "bias"} and weight is not None and weight.ndim == 1
    return has_scale and getattr(module, "data_format", "channels_last") == "channels_last"  # ConvNeXt has both


def is_embedding(module: nn.Module) -> bool:
    """Whether a module is an embedding, with an output that is linear in its weight."""
    is_linear = type(module) is nn.Embedding or type(module).__name__.endswith(EMBEDDING_SUFFIXES)
    return is_linear and isinstance(module, nn.Embedding)


def can_have_expert_parameters(name: str, module: nn.Module, selected: ExpertParameters) -> bool:
    """Whether ``expert_parameters=selected`` lets the parameters of a module differ between experts.

    Embeddings of relative positions are excluded: they belong to pairs of tokens and are looked up once for all inputs.
    """
    if selected == "all" and is_embedding(module):
        return cast(nn.Embedding, module).max_norm is None and "relative" not in name
    return selected != "layers" and is_norm(module)


def expert_parameter_names(model: nn.Module, selected: ExpertParameters, remove_duplicate: bool = True) -> list[str]:
    """The names in the state dict of the parameters that can differ between experts, of each module one or all."""
    named = model.named_modules(remove_duplicate=remove_duplicate)
    modules = {n: m for n, m in named if can_have_expert_parameters(n, m, selected)}
    return [f"{name}.{p}" for name, module in modules.items() for p, _ in module.named_parameters(recurse=False)]


def attach_expert_parameters(
    model: nn.Module, router: InputRouter, differences: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Have modules use the parameters of the experts that a router chooses.

    The router stores the differences: module name → parameter name → (T, …).
    """
    for name, parameters in differences.items():
        for parameter, value in parameters.items():
            router.own[_key(name, parameter)] = nn.Parameter(value, requires_grad=False)
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_EmbeddingHook(router, name), with_kwargs=True)
        else:
            module.register_forward_hook(_NormHook(router, name))


def detach_expert_parameters(model: nn.Module) -> None:
    """Have all modules use the pretrained parameters."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _ExpertParametersHook):
                del module._forward_hooks[key]


def modules_with_expert_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Module name → the names of its parameters that differ between experts."""
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, _ExpertParametersHook):
                names[name] = [p for p in ("weight", "bias") if hook.differences(p) is not None]
    return names


def _key(module: str, parameter: str) -> str:
    return f"{module}/{parameter}".replace(".", "/")  # a dot would name a submodule


class _ExpertParametersHook:
    """A forward hook of one module."""

    def __init__(self, router: InputRouter, name: str) -> None:
        self.router, self.name = router, name

    def differences(self, parameter: str) -> Tensor | None:
        """The differences of all experts: (T, …)."""
        key = _key(self.name, parameter)
        return self.router.own.get(key, None)


class _NormHook(_ExpertParametersHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        weights = self.router.chosen_weights(output.shape[0])  # len() would fix the size of an export
        if weights is None:
            return output
        scale, shift = (self._of_inputs(parameter, weights, output) for parameter in ("weight", "bias"))
        output = output if scale is None else output + _normalized(module, args[0]) * scale
        return output if shift is None else output + shift

    def _of_inputs(self, parameter: str, weights: Tensor, output: Tensor) -> Tensor | None:
        """The weighted difference for each input: (B, 1, …, D)."""
        differences = self.differences(parameter)
        if differences is None:
            return None
        mixed = weights.to(differences) @ differences
        return mixed.view(mixed.shape[0], *[1] * (output.ndim - 2), mixed.shape[1]).to(output.dtype)


class _EmbeddingHook(_ExpertParametersHook):
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:  # fmt: skip
        state = active_state(self.router)
        if state is None or not state.num_inputs or self.router.chosen_weights(state.num_inputs) is None:
            return output
        num_inputs = state.num_inputs
        rows = output.shape[0]
        rows = rows if rows % num_inputs == 0 else num_inputs  # positions are looked up once for all
        weights, differences = self.router.chosen_weights(rows), self.differences("weight")
        assert weights is not None
        assert differences is not None
        added = output.new_zeros(rows, *output.shape[1:])
        groups = self.router.group_inputs(state, weights) or _all_inputs(weights)
        for expert, inputs in groups.members:
            embedded = _embed(module, differences[expert], args, kwargs, inputs, rows)
            weight = weights[inputs, expert].to(embedded.dtype)
            added.index_add_(0, inputs, embedded * weight.view(weight.shape[0], *[1] * (embedded.ndim - 1)))
        return output + added


def _embed(
    module: nn.Module, weight: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Tensor, rows: int
) -> Tensor:  # fmt: skip
    """The output of an embedding with another weight for some of the `rows` inputs: (inputs, …, D)."""
    if type(module) is nn.Embedding and args:
        return nn.functional.embedding(args[0].expand(rows, *args[0].shape[1:])[inputs], weight)
    embedded = torch.func.functional_call(_WithoutHooks(module), {"module.weight": weight}, args, kwargs)
    return embedded.expand(rows, *embedded.shape[1:])[inputs]


def _all_inputs(weights: Tensor) -> InputGroups:
    indices = torch.arange(weights.shape[0], device=weights.device)
    return InputGroups(weights.shape[0], [(expert, indices) for expert in range(weights.shape[1])])


def _normalized(module: nn.Module, x: Tensor) -> Tensor:
    """The normalised input of a norm, before scale and shift.

    It is the change of the output with the scale, so that norms that compute x̂·(1 + weight) (Gemma's) are right too.
    """
    scales = [torch.full_like(module.weight, value) for value in (1.0, 0.0)]  # type: ignore[arg-type]
    bias = getattr(module, "bias", None)
    shift = {} if bias is None else {"module.bias": torch.zeros_like(bias)}
    one, zero = (
        torch.func.functional_call(_WithoutHooks(module), {"module.weight": scale, **shift}, (x,)) for scale in scales
    )
    return one - zero


class _WithoutHooks(nn.Module):
    """The forward of a module without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.module.forward(*args, **kwargs)
