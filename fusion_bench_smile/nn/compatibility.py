"""Layers and models that routing can't serve: what is found in their code or settings, before any call.

A routed layer works where the model calls it. Code that reads the weight of a layer, as fused kernels do, would return
the pretrained model's outputs without a word.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

# methods that run before or beside a forward pass
SETUP_METHODS = (
    "__init__", "_init", "init_", "reset_parameters", "_reset", "extra_repr", "tie_", "_tie", "load_", "_load", "prune",
    "get_", "set_", "post_init", "convert", "resize", "_resize",
)  # fmt: skip
COMMON_CODE = ("torch.nn.", "transformers.modeling_utils", "transformers.generation", "builtins")  # reads no layer
HARMLESS_ATTRIBUTES = (
    "dtype",
    "device",
    "shape",
    "ndim",
    "size",
    "dim",
    "numel",
    "requires_grad",
    "is_cuda",
    "is_meta",
)
HARMLESS_CALLS = ("isinstance", "hasattr", "getattr")
KERNEL_METHOD = "cuda_kernels_forward"  # of state space models in transformers, where these functions are installed
KERNELS = ("mamba_inner_fn", "selective_scan_fn", "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")
WEIGHT_HOOKS = ("WeightNorm", "SpectralNorm")  # classes of the older form of torch.nn.utils


def read_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of some layers whose weight or bias other code of the model reads."""
    return [name for name in names if any(rest in _reads(model.get_submodule(owner)) for owner, rest in _owners(name))]


def _owners(name: str) -> Iterator[tuple[str, str]]:
    """The names of the modules around a layer, each with the rest of the layer's name."""
    parts = name.split(".")
    return ((".".join(parts[:depth]), ".".join(parts[depth:])) for depth in range(len(parts)))


def has_other_parametrization(module: nn.Module) -> bool:
    """Whether the weight of a module is computed from other parameters: weight norm, spectral norm and the like."""
    hooks = (type(hook).__name__ for hook in module._forward_pre_hooks.values())
    return parametrize.is_parametrized(module) or any(name in WEIGHT_HOOKS for name in hooks)


def is_wrapped(weight: Tensor) -> bool:
    """Whether a weight is of a class outside torch, such as a quantized tensor of torchao, which stores no sums."""
    return type(weight).__module__.partition(".")[0] != "torch"


def wrapped_weight(model: nn.Module) -> str | None:
    """The first parameter of a model that is of a class outside torch, with that class; None without one."""
    wrapped = ((name, p) for name, p in model.named_parameters() if is_wrapped(p))
    return next((f"{name} is of class {type(parameter).__name__}" for name, parameter in wrapped), None)


def scope_problem(model: nn.Module, layers: list[str]) -> str | None:
    """Why experts can't be chosen for whole inputs of a model with these upscaled layers; None if they can."""
    towers = [name for name in ("text_model", "vision_model") if any(x.startswith(f"{name}.") for x in layers)]
    if len(towers) == 2 and hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        return (
            f"{type(model).__name__} takes texts and images, which are different inputs: upscale one of its towers "
            "(target_modules='vision_model.*')"
        )
    return None


def model_problem(model: nn.Module) -> str | None:
    """Why a model can't be upscaled at all; None if it can."""
    rescales = getattr(getattr(model, "config", None), "rescale_every", 0)
    if rescales and any(hasattr(module, "_rescale_layers") for module in model.modules()):
        return (
            f"{type(model).__name__} divides its pretrained weights by powers of 2 while it runs "
            f"(rescale_every={rescales}), but not those of experts: set config.rescale_every=0 in the pretrained model"
        )
    return None


def _reads(module: nn.Module) -> set[str]:
    """The children of a module whose weight or bias its methods read."""
    return {
        name for name, conditions in _reads_of(cast(Any, type(module))) if all(_holds(c, module) for c in conditions)
    }


def _holds(condition: str, module: nn.Module) -> bool:
    """Whether a condition on the attributes of a module holds; True where it depends on something else."""
    test = ast.parse(condition, mode="eval").body
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return all(_holds(ast.unparse(part), module) for part in test.values)
    if "self.training" in condition or any(isinstance(node, ast.Call) for node in ast.walk(test)):
        return True
    try:
        return bool(eval(condition, {"self": module, "__builtins__": {}}))
    except Exception:
        return True


@cache
def _reads_of(module_type: type) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The names of children whose weight or bias the class reads, with the conditions under which it does."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for base in module_type.__mro__:
        if base.__module__.startswith(COMMON_CODE):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # no source
            continue
        has_kernels = any(getattr(sys.modules[base.__module__], name, None) is not None for name in KERNELS)
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and not method.name.startswith(SETUP_METHODS):
                found += _reads_in(method, ()) if method.name != KERNEL_METHOD or has_kernels else ()
    return tuple(found)


def _reads_in(node: ast.AST, conditions: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Reads of ``self.<child>.weight`` or ``.bias`` below a node: the child, and the conditions of branches around."""
    for name, value in ast.iter_fields(node):
        below = conditions
        if isinstance(node, (ast.If, ast.IfExp)) and name in ("body", "orelse"):
            test = ast.unparse(node.test)
            below = (*conditions, test if name == "body" else f"not ({test})")
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_harmless(child):
                continue
            if isinstance(child, ast.Attribute) and (layer := _layer_of_parameter(child)):
                yield layer, below
            yield from _reads_in(child, below)


def _is_harmless(node: ast.AST) -> bool:
    """Whether an expression looks at a parameter's type or presence alone."""
    if isinstance(node, ast.Attribute):
        return node.attr in HARMLESS_ATTRIBUTES and isinstance(node.value, ast.Attribute)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in HARMLESS_CALLS
    return isinstance(node, ast.Compare) and all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops)


def _layer_of_parameter(node: ast.Attribute) -> str | None:
    """The layer in ``self.child.weight``, ``self.child.layer.bias`` or ``self.attention.in_proj_weight``, if read."""
    names = ast.unparse(node.value).split(".")
    if node.attr in ("in_proj_weight", "in_proj_bias"):  # of attention that is split for routing
        names.append("in_proj")
    elif node.attr not in ("weight", "bias"):
        return None
    is_read = isinstance(node.ctx, ast.Load) and names[0] == "self" and all(name.isidentifier() for name in names)
    return ".".join(names[1:]) if is_read else None
