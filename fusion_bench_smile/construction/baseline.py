"""The noise baseline: the experts' scores of random inputs, which needs no data."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..exceptions import PlanError
from ..nn import InputRouter, entry_points

NUM_INPUTS, BATCH_SIZE, NUM_TOKENS = 256, 32, 32


@torch.no_grad()
def measure_baseline(model: nn.Module, router: InputRouter) -> Tensor:
    """Mean and standard deviation of the experts' scores of random inputs: (2, T), float32. It is deterministic.

    Raises:
        PlanError: The model's inputs are neither tokens nor images.
    """
    module, generator, training = entry_points(model)[0], torch.Generator().manual_seed(0), model.training
    model.eval()
    try:
        batches = (random_inputs(model, BATCH_SIZE, generator) for _ in range(0, NUM_INPUTS, BATCH_SIZE))
        scores = torch.cat([router.scores_of(module, batch) for batch in batches]).float()
    finally:
        model.train(training)
    return torch.stack([scores.mean(dim=0), scores.std(dim=0).clamp(min=1e-6)])


def random_inputs(model: nn.Module, count: int, generator: torch.Generator) -> dict[str, Any]:
    """Random keyword arguments of a transformers model, drawn by a generator on the CPU.

    They are uniform tokens (count, 32), or images with the 1/f spectrum of photographs (count, channels, size, size).

    Raises:
        PlanError: The model takes neither.
    """
    input_name = model.main_input_name if isinstance(model, PreTrainedModel) else None
    config, parameter = getattr(model, "config", None), next(model.parameters())
    vocabulary, size = getattr(config, "vocab_size", None), getattr(config, "image_size", None)
    if input_name == "input_ids" and isinstance(vocabulary, int):
        ids = torch.randint(vocabulary, (count, NUM_TOKENS), generator=generator).to(parameter.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if input_name == "pixel_values" and isinstance(size, int):
        images = _random_images((count, getattr(config, "num_channels", 3), size, size), generator)
        return {"pixel_values": images.to(parameter.device, parameter.dtype)}
    raise PlanError(
        f"noise_baseline: random inputs are known for models of tokens (input_ids) or images (pixel_values), and "
        f"{type(model).__name__} takes {input_name or 'other inputs'}; use noise_baseline=false"
    )


def _random_images(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    frequencies = torch.fft.fftfreq(shape[-1]).square()
    radius = (frequencies[:, None] + frequencies).sqrt()
    radius[0, 0] = 1 / shape[-1]
    images = torch.fft.ifft2(torch.fft.fft2(torch.randn(shape, generator=generator)) / radius).real
    return images / images.std(dim=(1, 2, 3), keepdim=True)
