"""Upscaled models where others use models: pipelines and ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import clip_inputs, clip_tower, experts_of, output
from text_models import TEXTS, llama, tokenizer, tokens, upscaled
from torch import Tensor, nn

from fusion_bench_smile import upscale


def test_a_pipeline_generates_what_the_model_generates(tmp_path: Path) -> None:
    model = upscaled(llama())
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path), tokenizer=tokenizer())
    options = {"max_new_tokens": 5, "do_sample": False}
    for text, (found,) in zip(TEXTS, pipeline(TEXTS, return_tensors=True, **options), strict=True):
        expected = model.generate(**tokens([text]), pad_token_id=0, **options)[0].tolist()
        assert found["generated_token_ids"] == expected


class HiddenState(nn.Module):
    """The last hidden state of a model, as its only output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map images to hidden states."""
        return self.model(pixel_values=pixel_values).last_hidden_state


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_a_model_with_token_routing(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    base, pixels = clip_tower(), clip_inputs()["pixel_values"]
    model = upscale(base, experts_of(base), gate_k=2, k=4).eval()
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(HiddenState(model).eval(), (pixels,), dynamo=True, dynamic_shapes=batch)
    program.save(str(tmp_path / "model.onnx"))
    evaluator = reference.ReferenceEvaluator(str(tmp_path / "model.onnx"))
    for size in (6, 3):
        (found,) = evaluator.run(None, {evaluator.input_names[0]: pixels[:size].numpy()})
        expected = output(model, {"pixel_values": pixels[:size]}).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
