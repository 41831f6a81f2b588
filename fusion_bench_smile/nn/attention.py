"""Attention with layers that routed ones can replace, in the place of `torch.nn.MultiheadAttention`.

torch's module reads `in_proj_weight` and the weight of `out_proj` in fused kernels and calls no layer, so experts in
them would be ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy, deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compatibility import has_other_parametrization

PARAMETERS = {"in_proj.weight": "in_proj_weight", "in_proj.bias": "in_proj_bias"}  # the name here → torch's


class SplitMultiheadAttention(nn.MultiheadAttention):
    """A `torch.nn.MultiheadAttention` that calls its layers `in_proj`, a linear layer (E, 3E), and `out_proj`.

    It computes the same. The parameters `in_proj_weight` and `in_proj_bias` are called `in_proj.weight` and
    `in_proj.bias`. Code that reads the former past the forward pass fails, and does not miss the experts.
    """

    in_proj: nn.Module

    @classmethod
    def from_attention(cls, attention: nn.MultiheadAttention) -> SplitMultiheadAttention:
        """An attention that shares the parameters and settings of torch's."""
        split = cls.__new__(cls)
        nn.Module.__init__(split)
        split.__dict__.update({key: copy(value) for key, value in attention.__dict__.items()})
        split.in_proj = nn.Linear(split.embed_dim, 3 * split.embed_dim, device="meta").train(split.training)
        for name, original in PARAMETERS.items():
            split.in_proj.register_parameter(name.removeprefix("in_proj."), split._parameters.pop(original))
        return split

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `torch.nn.MultiheadAttention.forward`. `in_proj` is called once for each distinct tensor."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint that attn_mask is causal: give attn_mask too")
        q = self.in_proj(query)
        k = q if key is query else self.in_proj(key)
        v = q if value is query else k if value is key else self.in_proj(value)
        heads = [self._heads(x.unflatten(-1, (3, -1))[..., part, :]) for part, x in enumerate((q, k, v))]
        mask = self._mask(attn_mask, key_padding_mask, heads[0].dtype)
        by_kernel = is_causal and key_padding_mask is None and not need_weights  # the kernel has a causal mask
        output, weights = self._attend(heads, None if by_kernel else mask, need_weights, by_kernel)
        if query.dim() == 2:  # unbatched
            output, weights = output[0], None if weights is None else weights[0]
        elif not self.batch_first:
            output = output.transpose(0, 1)
        return self.out_proj(output), weights.mean(-3) if weights is not None and average_attn_weights else weights

    def _heads(self, x: Tensor) -> Tensor:
        """A projection (T, E), (B, T, E) or, time-first, (T, B, E) as (B, heads, T, D)."""
        if x.dim() == 2:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores (B, heads, L, S) for a mask (L, S) or (B · heads, L, S), and one (B, S)."""
        masks = []
        if attn_mask is not None:
            by_head = attn_mask.dim() == 3
            masks.append(attn_mask.unflatten(0, (-1, self.num_heads)) if by_head else attn_mask[None, None])
        if padding is not None:
            masks.append(padding.view(-1, 1, 1, padding.shape[-1]))
        added = [_additive(mask, dtype) for mask in masks]
        return sum(added[1:], start=added[0]) if added else None

    def _attend(
        self, heads: list[Tensor], mask: Tensor | None, need_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The attended values (B, L, E), and the weights (B, heads, L, S) if they are needed."""
        q, k, v = heads
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            output = weights @ v
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return output.transpose(1, 2).flatten(2), weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores: −∞ where a boolean one is true."""
    zeros = torch.zeros_like(mask, dtype=dtype)
    return zeros.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask.to(dtype)


def split_attention(model: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """A model that shares all parameters and buffers of another one and calls the layers of its attention.

    Every `torch.nn.MultiheadAttention` that can be split, or that is one of `names`, becomes a
    `SplitMultiheadAttention`. A model without one is returned as it is.
    """
    names = splittable(model) if names is None else names
    if not names:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return split_in_place(deepcopy(model, shared), names)


def split_in_place(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Split attention modules of a model. Returns the model."""
    modules = {model.get_submodule(name) for name in names}
    whole = [module for module in modules if type(module) is nn.MultiheadAttention]
    replace_modules(model, {module: SplitMultiheadAttention.from_attention(module) for module in whole})
    return model


def splittable(model: nn.Module) -> list[str]:
    """The names of the attention modules of a model that can be split.

    Others have additional keys and values or separate projections, are part of a `torch.nn.TransformerEncoderLayer`,
    which reads their weights, or are the model itself.
    """
    encoder_layers = (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer))
    fused = {part for layer in encoder_layers for part in layer.modules()}
    return [name for name, module in model.named_modules() if name and module not in fused and _can_split(module)]


def _can_split(module: nn.Module) -> bool:
    if type(module) is not nn.MultiheadAttention or has_other_parametrization(module):
        return False
    return module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn


def split_names(model: nn.Module) -> list[str]:
    """The names of the attention modules of a model that are split."""
    return [name for name, module in model.named_modules() if isinstance(module, SplitMultiheadAttention)]


def names_before_splitting(model: nn.Module) -> dict[str, str]:
    """Name of a parameter of split attention → its name in torch's module."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name, module in modules.items() if isinstance(module, SplitMultiheadAttention)]
    return {f"{name}.{after}": f"{name}.{before}" for name in names for after, before in PARAMETERS.items()}


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules of a model, each under all of its names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(name, replacements[module])
