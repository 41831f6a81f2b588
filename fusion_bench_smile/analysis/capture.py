"""Model calls captured from the evaluation of a task pool, and the error of hidden states over depth."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..exceptions import SmileError


@dataclass(frozen=True)
class ModelCall:
    """The positional and keyword arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, model: nn.Module) -> Any:
        """Call a model with the same arguments, without gradients."""
        with torch.no_grad():
            return model(*self.args, **self.kwargs)

    @property
    def attention_mask(self) -> Tensor | None:
        """The mask of tokens that are not padding: (batch, tokens), bool; None if the call has none of this shape."""
        mask = self.kwargs.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def token_mask(self, values: Tensor) -> Tensor:
        """Whether each input or output (…, n) of a layer in this call belongs to a token, not to padding: (…), bool.

        The mask lies on the device of the values. All are True where the attention mask has another shape.
        """
        mask = self.attention_mask
        if mask is None or mask.shape != values.shape[:-1]:
            return torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
        return mask.to(values.device)


class _CallLimitReached(Exception):  # noqa: N818  # control flow, not an error
    pass


def capture_calls(model: nn.Module, evaluate: Callable[[nn.Module], Any], limit: int) -> list[ModelCall]:
    """Capture the first calls of a model during its evaluation, which stops after `limit` calls.

    Raises SmileError if the evaluation never calls the model.
    """
    calls: list[ModelCall] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(ModelCall(args, dict(kwargs)))
        if len(calls) >= limit:
            raise _CallLimitReached

    with model.register_forward_pre_hook(hook, with_kwargs=True), suppress(_CallLimitReached):
        evaluate(model)
    if not calls:
        raise SmileError("the task pool didn't call the model: this study needs a task pool that does")
    return calls


@contextmanager
def capture_outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Capture the outputs of some modules inside the ``with`` block: name → outputs (…, hidden), one for each call.

    A tuple contributes its first element.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}

    def collect(name: str, _: nn.Module, __: Any, output: Any) -> None:
        outputs[name].append((output[0] if isinstance(output, tuple) else output).detach())

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(collect, name)))
        yield outputs


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name → block of a model: the members of its outermost `nn.ModuleList`s that contain linear layers, in order."""
    blocks_by_name: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{block}.") for block in blocks_by_name)
        if isinstance(module, nn.ModuleList) and not nested:
            for number, member in enumerate(module):
                if any(isinstance(part, nn.Linear) for part in member.modules()):
                    blocks_by_name[f"{name}.{number}"] = member
    return blocks_by_name


@torch.no_grad()
def error_accumulation(
    individual: nn.Module, models: Mapping[str, nn.Module], calls: Sequence[ModelCall]
) -> pd.DataFrame:
    """The relative error of some models' hidden states after each block; the individual model is the reference.

    An upscaled model errs by truncation and routing; with oracle routing (always the task's expert) by truncation only.

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
