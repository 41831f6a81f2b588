"""What our task pools have in common."""

from __future__ import annotations

from typing import Any

from fusion_bench.utils import instantiate
from fusion_bench.utils.parameters import count_parameters
from omegaconf import DictConfig
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .ending import one_clear_line
from .errors import SmileError


def load_tokenizer(source: str | DictConfig | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer from its name or configuration, or as it is.

    Raises:
        SmileError: if there is none of that name.
    """
    if not isinstance(source, str):
        return instantiated(source)
    with one_clear_line():
        try:
            return AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SmileError(f"no tokenizer in {source!r}: {reason}; set taskpool.tokenizer") from None


def instantiated(source: Any) -> Any:
    return instantiate(source) if isinstance(source, (DictConfig, dict)) else source


def model_info(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """What the framework's task pools report of the model."""
    trainable, parameters = count_parameters(model)
    info = {"trainable_params": trainable, "all_params": parameters, "trainable_percentage": trainable / parameters}
    return info | ({} if name is None else {"name": name})
