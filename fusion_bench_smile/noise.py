"""What an expert scores of inputs that belong to nobody: random ones, for which no data is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import PlanError
from .scopes import InputRouter, entrances

INPUTS, BATCH, TOKENS = 256, 32, 32


@torch.no_grad()
def measure_baseline(model: nn.Module, router: InputRouter) -> Tensor:
    """Mean and deviation of the experts' scores of random inputs: (2, T), float32. The same every time.

    Raises:
        PlanError: for a model whose inputs are neither tokens nor images.
    """
    entrance, generator = entrances(model)[0], torch.Generator().manual_seed(0)
    training = model.training
    model.eval()
    try:
        scores = [router.scores_of(entrance, random_inputs(model, BATCH, generator)) for _ in range(0, INPUTS, BATCH)]
    finally:
        model.train(training)
    everything = torch.cat(scores).float()
    return torch.stack([everything.mean(dim=0), everything.std(dim=0).clamp(min=1e-6)])


def random_inputs(model: nn.Module, count: int, generator: torch.Generator) -> dict[str, Any]:
    """Arguments of the model: tokens, all as likely, or images whose spectrum falls with the frequency as pictures' do.

    Raises:
        PlanError: for a model that takes neither.
    """
    of_transformers = isinstance(model, PreTrainedModel)
    kind = model.main_input_name if of_transformers else None
    vocabulary, size = (getattr(getattr(model, "config", None), name, None) for name in ("vocab_size", "image_size"))
    device = next(model.parameters()).device
    if kind == "input_ids" and isinstance(vocabulary, int):
        ids = torch.randint(vocabulary, (count, TOKENS), generator=generator).to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "pixel_values" and isinstance(size, int):
        channels = getattr(model.config, "num_channels", 3)
        return {
            "pixel_values": _pictures((count, channels, size, size), generator).to(
                device, next(model.parameters()).dtype
            )
        }
    raise PlanError(
        f"noise_baseline: random inputs are known for models of tokens (input_ids) or images (pixel_values), and "
        f"{type(model).__name__} takes {kind or 'others'}; use noise_baseline=false"
    )


def _pictures(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    frequencies = torch.fft.fftfreq(shape[-1]).square()
    radius = (frequencies[:, None] + frequencies).sqrt()
    radius[0, 0] = 1 / shape[-1]
    pictures = torch.fft.ifft2(torch.fft.fft2(torch.randn(shape, generator=generator)) / radius).real
    return pictures / pictures.std(dim=(1, 2, 3), keepdim=True)
