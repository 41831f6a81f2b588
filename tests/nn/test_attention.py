"""Split attention: what `torch.nn.MultiheadAttention` computes, by layers that are called."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fusion_bench_smile.nn import SplitMultiheadAttention, split_attention
from fusion_bench_smile.nn.attention import split_in_place, split_names, splittable

EMBED, HEADS, BATCH, QUERIES, KEYS = 16, 4, 3, 5, 7
MASKS = ("none", "boolean", "float", "by head", "causal")


def attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(EMBED, HEADS, **options)
    for parameter in module.parameters():  # biases of zero hide errors
        nn.init.normal_(parameter, std=0.3)
    return module


def inputs(kind: str, batched: bool, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value: the same tensor, two, or three."""

    def tensor(length: int) -> Tensor:
        shape = (BATCH, length, EMBED) if batch_first else (length, BATCH, EMBED)
        return torch.randn(shape if batched else (length, EMBED))

    query = tensor(QUERIES)
    if kind == "self":
        return query, query, query
    key = tensor(KEYS)
    return query, key, key if kind == "cross" else tensor(KEYS)


def masks(mask: str, padded: bool, keys: int, batched: bool) -> dict[str, object]:
    """The arguments for masks in which every query sees a key."""
    arguments: dict[str, object] = {}
    if padded:
        padding = torch.zeros(BATCH, keys, dtype=torch.bool)
        padding[0, -2:] = True
        arguments["key_padding_mask"] = padding if batched else padding[0]
    hidden = torch.rand(HEADS * (BATCH if batched else 1), QUERIES, keys) < 0.4
    hidden[..., 0] = False
    if mask == "boolean":
        arguments["attn_mask"] = hidden[0]
    elif mask == "float":
        arguments["attn_mask"] = torch.randn(QUERIES, keys)
    elif mask == "by head":
        arguments["attn_mask"] = hidden
    elif mask == "causal":
        arguments |= {"attn_mask": torch.ones(QUERIES, keys).triu(1).bool(), "is_causal": True}
    return arguments


def assert_same(results: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    assert (results[1] is None) == (expected[1] is None)
    for result, reference in zip(results, expected, strict=True):
        if reference is not None:
            torch.testing.assert_close(result, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("batched_first", [(True, True), (True, False), (False, False), (False, True)])
@pytest.mark.parametrize("kind", ["self", "cross", "three"])
@pytest.mark.parametrize("mask", MASKS)
def test_it_computes_what_torchs_attention_does(kind, mask, batched_first):
    batched, batch_first = batched_first
    for bias, training in itertools.product((True, False), (True, False)):
        module = attention(batch_first=batch_first, bias=bias).train(training)
        split = SplitMultiheadAttention.from_attention(module)
        arguments = inputs(kind, batched, batch_first)
        for padded, needs, average in itertools.product((True, False), repeat=3):
            options = masks(mask, padded, arguments[1].shape[-2 if batch_first or not batched else 0], batched)
            options |= {"need_weights": needs, "average_attn_weights": average}
            with torch.set_grad_enabled(training):  # in evaluation torch takes its fused path
                assert_same(split(*arguments, **options), module(*arguments, **options))


@pytest.mark.parametrize("needs", [True, False])
def test_gradients(needs):
    module = attention(batch_first=True)
    split = SplitMultiheadAttention.from_attention(module)
    query, key, value = inputs("three", batched=True, batch_first=True)
    gradients = []
    for each in (module, split):
        each.zero_grad()
        each(query, key, value, need_weights=needs)[0].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    for result, reference in zip(*gradients, strict=True):
        assert reference.abs().max() > 0.1
        torch.testing.assert_close(result, reference, atol=1e-4, rtol=1e-4)


def test_dropout_in_training_alone():
    split = SplitMultiheadAttention.from_attention(attention(dropout=0.5, batch_first=True))
    x = torch.randn(1, 200, EMBED)
    for needs in (True, False):
        assert not torch.equal(split(x, x, x, need_weights=needs)[0], split(x, x, x, need_weights=needs)[0])
    weights = split(x, x, x, average_attn_weights=False)[1]
    assert float((weights == 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    split.eval()
    assert torch.equal(split(x, x, x)[0], split(x, x, x)[0])


def test_each_distinct_tensor_is_projected_once():
    split = SplitMultiheadAttention.from_attention(attention(batch_first=True)).eval()
    calls: list[Tensor] = []
    split.in_proj.register_forward_hook(lambda module, args, output: calls.append(args[0]))
    for kind, count in (("self", 1), ("cross", 2), ("three", 3)):
        calls.clear()
        split(*inputs(kind, batched=True, batch_first=True))
        assert len(calls) == count


def test_a_causal_hint_needs_a_mask():
    module, x = attention(), torch.randn(4, 2, EMBED)
    for each in (module, SplitMultiheadAttention.from_attention(module)):
        with pytest.raises(RuntimeError, match="is_causal"):
            each(x, x, x, is_causal=True)


class Block(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.attention, self.also = module, module
        self.register_buffer("scale", torch.ones(1), persistent=False)


def test_a_split_model_shares_its_tensors_and_leaves_the_model_alone():
    model = Block(attention())
    before, names = [*model.parameters(), *model.buffers()], list(model.state_dict())
    split = split_attention(model)
    assert type(split) is Block
    assert split.attention is split.also
    assert isinstance(split.attention, SplitMultiheadAttention)
    assert {id(x) for x in (*split.parameters(), *split.buffers())} == {id(tensor) for tensor in before}
    assert list(model.state_dict()) == names
    assert type(model.attention) is nn.MultiheadAttention
    assert split_attention(split) is split
    plain = nn.Sequential(nn.Linear(2, 2))
    assert split_attention(plain) is plain
    assert split_in_place(model, ["attention"]) is model
    assert split_names(model) == ["attention"]
    assert model.also is model.attention


def test_attention_that_can_not_be_split():
    modules = {
        "bias_kv": attention(add_bias_kv=True), "zero": attention(add_zero_attn=True), "kdim": attention(kdim=8),
        "layer": nn.TransformerEncoderLayer(EMBED, HEADS), "decoder": nn.TransformerDecoderLayer(EMBED, HEADS),
        "normed": nn.utils.parametrizations.weight_norm(attention(), "in_proj_weight"), "plain": attention(),
    }  # fmt: skip
    model = nn.ModuleDict(modules)
    assert splittable(model) == ["decoder.self_attn", "decoder.multihead_attn", "plain"]
    assert splittable(attention()) == []


def test_a_decoder_layer_calls_its_attention():
    layer = nn.ModuleDict({"layer": nn.TransformerDecoderLayer(EMBED, HEADS, dropout=0.0, batch_first=True)}).eval()
    x, memory = torch.randn(2, 5, EMBED), torch.randn(2, 7, EMBED)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    expected = layer["layer"](x, memory, tgt_mask=mask, tgt_is_causal=True)
    result = split_attention(layer)["layer"](x, memory, tgt_mask=mask, tgt_is_causal=True)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
