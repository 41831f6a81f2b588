"""Functions of all task pools: evaluation divided among processes, tokenizers, model statistics."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fusion_bench.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...construction import WorkPartition
from ...exceptions import SmileError
from ...nn import count_parameters

Result = TypeVar("Result")


def evaluate_in_batches(
    order: Sequence[int], batch_size: int, evaluate: Callable[[Sequence[int]], Sequence[Result]], *, task: str,
    fast_dev_run: bool = False,
) -> list[Result]:  # fmt: skip
    """Evaluate every example of a task once, with the batches divided among all processes.

    The batches are the same for any number of processes: padding them otherwise would change the last digits.

    Args:
        order: indices of the examples, in the order in which they fill batches.
        evaluate: indices of one batch → one result of each example.
        task: the name in the progress bar.
        fast_dev_run: evaluate the first batch of each process only.

    Returns:
        The results of all processes, in the order of the examples' indices. Every process gets all of them.
    """
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    results: dict[int, Result] = {}
    with WorkPartition(single_process=False) as partition:
        own_batches = batches[partition.rank :: partition.size]
        for indices in tqdm(own_batches[:1] if fast_dev_run else own_batches, desc=f"Evaluating {task}", leave=False):
            results |= dict(zip(indices, evaluate(indices), strict=True))
        gathered = {index: result for part in partition.all_gather(results) for index, result in part.items()}
    return [gathered[index] for index in sorted(gathered)]


def load_tokenizer(source: str | DictConfig | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer of a configuration, a name on the hub or a folder; a tokenizer is returned as it is.

    Raises SmileError if a name or folder has no tokenizer.
    """
    if not isinstance(source, str):
        return instantiate_config(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SmileError(f"no tokenizer in {source!r}: {str(error).splitlines()[0]}; set taskpool.tokenizer") from None


def instantiate_config(source: Any) -> Any:
    """The object of a configuration; anything else is returned as it is."""
    return instantiate(source) if isinstance(source, (DictConfig, dict)) else source


def model_info(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Parameter counts of a model, as the framework's task pools report them."""
    total = count_parameters(model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    info = {"trainable_params": trainable, "all_params": total, "trainable_percentage": trainable / total}
    return info | ({} if name is None else {"name": name})
