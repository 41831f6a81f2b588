"""Export and tracing of upscaled models: one graph for batches of any size and inputs of any expert."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import experts_of
from torch import Tensor, nn
from torch.export import Dim, export
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, ViTConfig, ViTModel

from fusion_bench_smile import record_routing, upscale

SCOPES = ["token", "input"]
SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZE, "vocab_size": 40, "attn_implementation": "eager"}


class FirstOutput(nn.Module):
    """A model of one tensor that returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


def bert() -> tuple[nn.Module, list[Tensor]]:
    return BertModel(BertConfig(**TEXT), add_pooling_layer=False).eval(), token_batches()


def llama() -> tuple[nn.Module, list[Tensor]]:
    return LlamaModel(LlamaConfig(**TEXT, use_cache=False)).eval(), token_batches()


def vit() -> tuple[nn.Module, list[Tensor]]:
    config = ViTConfig(**SIZE, image_size=8, patch_size=4)
    return ViTModel(config, add_pooling_layer=False).eval(), [torch.randn(n, 3, 8, 8) for n in (2, 5)]


def token_batches() -> list[Tensor]:
    """A batch to record, and a larger one."""
    return [torch.randint(1, 40, (n, 2)) for n in (2, 20)]


Make = Callable[[], tuple[nn.Module, list[Tensor]]]


def upscaled(make: Make, scope: str, **options: object) -> tuple[nn.Module, list[Tensor]]:
    base, batches = make()
    model = upscale(base, experts_of(base, 3, 0.3), gate_k=2, k=4, routing_scope=scope, **options)
    return FirstOutput(model).eval(), batches


def assert_same_outputs(recorded: Callable[[Tensor], Tensor], model: nn.Module, batches: list[Tensor]) -> None:
    """The graph and the model agree on the recorded batch and on another one, whose inputs have other experts."""
    routed = []
    with torch.no_grad():
        for batch in batches:
            with record_routing(model) as routing:
                expected = model(batch)
            torch.testing.assert_close(recorded(batch), expected, rtol=1e-4, atol=1e-5)
            routed.append([layer.experts[-1] for layer in routing.values()])  # of tokens or inputs
    assert any(not torch.equal(first[:1].expand_as(other), other) for first, other in zip(*routed, strict=True))


@pytest.mark.parametrize(
    ("make", "scope", "options"),
    [(bert, "token", {}), (vit, "input", {"top_k": 2}), (llama, "input", {}), (llama, "input", {"storage": "int4"})],
)
def test_an_export_takes_batches_of_any_size(make: Make, scope: str, options: dict) -> None:
    model, batches = upscaled(make, scope, **options)
    with torch.no_grad():
        model(batches[0])
        program = export(model, (batches[0],), dynamic_shapes={"x": {0: Dim("batch", min=2, max=64)}})
    assert_same_outputs(program.module(), model, batches)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("make", "options"), [(bert, {}), (vit, {"top_k": 2}), (vit, {"execution": "grouped"})])
def test_a_trace_is_right_for_other_inputs(make: Make, scope: str, options: dict) -> None:
    model, batches = upscaled(make, scope, **options)
    with torch.no_grad():
        model(batches[0])
        trace = torch.jit.trace(model, (batches[0],), check_trace=False)
    assert_same_outputs(trace, model, batches)


def test_a_model_is_called_once_before_it_is_exported() -> None:
    """Otherwise it isn't known which layers keep the inputs apart."""
    model, batches = upscaled(vit, "input")
    for record in (export, torch.jit.trace):
        with pytest.raises(RuntimeError, match="call the model once before"), torch.no_grad():
            record(model, (batches[0],))
