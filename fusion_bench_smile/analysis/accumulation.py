"""Error accumulation over depth: hidden states of upscaled models against those of the individual model.

An upscaled model errs by truncation and routing; with oracle routing (always the task's expert) by truncation only.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from .capture import ModelCall, blocks, capture_outputs


@torch.no_grad()
def error_accumulation(
    individual: nn.Module, models: Mapping[str, nn.Module], calls: Sequence[ModelCall]
) -> pd.DataFrame:
    """The relative error of some models' hidden states after each block; the individual model is the reference.

    Returns:
        One row for each model and block: ``model``, ``block`` (from 1), ``name`` (of the block) and ``error``,
        ‖h − h₀‖ / ‖h₀‖ over all tokens except padding.
    """
    reference = _hidden_states(individual, calls)
    rows = []
    for name, model in models.items():
        states = _hidden_states(model, calls)
        for number, (block, expected) in enumerate(reference.items(), start=1):
            error = float((states[block] - expected).norm() / expected.norm())
            rows.append({"model": name, "block": number, "name": block, "error": error})
    return pd.DataFrame(rows)


def _hidden_states(model: nn.Module, calls: Sequence[ModelCall]) -> dict[str, Tensor]:
    """Block → hidden states of all tokens except padding: (n, hidden), float64."""
    with capture_outputs(blocks(model)) as outputs:
        for call in calls:
            call(model)
    return {
        name: torch.cat([state[call.token_mask(state)].double() for call, state in zip(calls, states, strict=True)])
        for name, states in outputs.items()
    }
