"""Error accumulation against hidden states captured by hand, and the exclusion of padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output, perturbed
from torch import nn
from transformers import BertConfig, BertModel

from fusion_bench_smile import upscale
from fusion_bench_smile.analysis import ModelCall, blocks, error_accumulation, routing_by_task


@pytest.mark.parametrize("execution", ["grouped", "masked"])
def test_padding_is_excluded(execution):
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    base = BertModel(config, add_pooling_layer=False).eval()
    names = ("0", "1", "2")
    model = upscale(base, experts_of(base), k=4, gate_k=4, execution=execution).eval()
    ids = torch.randint(5, 50, (3, 6))
    short = ModelCall((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    padded = ModelCall((), {name: nn.functional.pad(value, (0, 9)) for name, value in short.kwargs.items()})
    plain, with_padding = (routing_by_task(model, {"0": [call]}, names) for call in (short, padded))
    np.testing.assert_allclose(plain["share"], with_padding["share"], atol=1e-6)
    np.testing.assert_allclose(plain["entropy"], with_padding["entropy"], atol=1e-5)
    error, error_padded = (error_accumulation(base, {"it": model}, [call]) for call in (short, padded))
    assert len(error) == 2
    np.testing.assert_allclose(error["error"], error_padded["error"], rtol=1e-4)


def test_errors_grow_with_truncation():
    base = clip_tower()
    expert = perturbed(base, seed=1)
    calls = [ModelCall((), clip_inputs()) for _ in range(2)]
    models = {"itself": expert, **{f"rank {k}": upscale(base, [expert], k=k).eval() for k in (1, 8)}}
    table = error_accumulation(expert, models, calls)
    pivot = table.pivot(index="block", columns="model", values="error")
    assert (pivot["itself"] == 0).all()
    assert (pivot["rank 8"] < pivot["rank 1"]).all()
    last = list(blocks(expert))[-1]
    states = {}
    for name, model in (("individual", expert), ("truncated", models["rank 1"])):
        outputs: list[torch.Tensor] = []
        handle = model.get_submodule(last).register_forward_hook(
            lambda _, __, out, outputs=outputs: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for call in calls:
            output(model, dict(call.kwargs))
        handle.remove()
        states[name] = torch.cat(outputs).double()
    expected = (states["truncated"] - states["individual"]).norm() / states["individual"].norm()
    assert pivot["rank 1"].iloc[-1] == pytest.approx(float(expected), rel=1e-6)
