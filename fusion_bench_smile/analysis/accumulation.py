"""How errors grow with depth: hidden states of the upscaled model against the individual model's.

Two references tell two causes apart: the upscaled model errs by truncation and by routing, the same experts with every
token given to its task's own expert by truncation alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from .inputs import Call, blocks, outputs_of


@torch.no_grad()
def error_accumulation(individual: nn.Module, others: dict[str, nn.Module], calls: Sequence[Call]) -> pd.DataFrame:
    """The distance of some models' hidden states from the individual model's, block by block.

    Args:
        individual: the fine-tuned model.
        others: name → model of the same architecture.
        calls: the inputs.

    Returns:
        One row for each model and block: ``model``, ``block`` (from 1), ``name`` and ``error``, ‖h − h₀‖ / ‖h₀‖ over
        all tokens that are no padding.
    """
    reference = _hidden_states(individual, calls)
    rows = []
    for name, model in others.items():
        states = _hidden_states(model, calls)
        for number, (block, own) in enumerate(reference.items()):
            relative = float((states[block] - own).norm() / own.norm())
            rows.append({"model": name, "block": number + 1, "name": block, "error": relative})
    return pd.DataFrame(rows)


def _hidden_states(model: nn.Module, calls: Sequence[Call]) -> dict[str, Tensor]:
    """For each block the hidden states of all tokens that are no padding: (n, hidden), float64."""
    with outputs_of(blocks(model)) as seen:
        for call in calls:
            call(model)
    return {
        name: torch.cat([state[call.real(state)].double() for call, state in zip(calls, states, strict=True)])
        for name, states in seen.items()
    }
