"""The framework's CLIP task pool, exact on any number of processes."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler
from tqdm.auto import tqdm

from ...construction import destroy_process_group_at_exit
from ...exceptions import PlanError, SmileError
from ...nn import RoutingEvent, layers_with_router, observe_routing
from ..jobs import process_rank


class ExactCLIPVisionModelTaskPool(CLIPVisionModelTaskPool):
    """The framework's CLIP task pool with every sample counted once, on any number of processes.

    The framework's own pool repeats samples to give every process the same number, and keeps its counts on the CPU,
    where NCCL can't reduce them. Here each process sums correct answers and losses over samples that are no repetition,
    and three numbers for each task are reduced on the device. The report has the number of samples of each task.

    Args:
        layer_wise_routing_weights_save_path: a folder for the routers' scores of every token, as the framework's
            ``SmileCLIPVisionModelTaskPool`` saves them: ``<task>/layer_<i>_<linear module>.pt`` with a tensor
            (tokens, T), T experts. Each process of several saves its own samples, with ``_rank<r>`` in the name.
        layer_wise_routing_weights_max_num: the largest number of tokens for each file; None for all.
        linear_module_names: the layers of a block, e.g. ``mlp.fc1``; None for all with a router.
        options: those of the framework's task pool.
    """

    def __init__(
        self, *args: Any, layer_wise_routing_weights_save_path: str | None = None,
        layer_wise_routing_weights_max_num: int | None = None, linear_module_names: Sequence[str] | str | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **options)
        names = [linear_module_names] if isinstance(linear_module_names, str) else linear_module_names
        self.linear_module_names = None if names is None else list(names)
        self.layer_wise_routing_weights_save_path = layer_wise_routing_weights_save_path
        self.layer_wise_routing_weights_max_num = layer_wise_routing_weights_max_num
        self._recording = ExitStack()

    def on_task_evaluation_begin(self, classifier: Any, task_name: str) -> None:
        """Begin to record the routing of a task, if it is to be saved.

        Raises PlanError if the model has no such layer with a router.
        """
        super().on_task_evaluation_begin(classifier, task_name)
        if self.layer_wise_routing_weights_save_path is not None:
            folder, rank = Path(self.layer_wise_routing_weights_save_path) / task_name, process_rank()
            model, limit = classifier.clip_model.vision_model, self.layer_wise_routing_weights_max_num
            suffix = f"_rank{rank}" if self.fabric.world_size > 1 else ""
            files = {name: folder / f"{stem}{suffix}.pt" for name, stem in self._layers(model).items()}
            self._recording.enter_context(save_scores(model, files, limit or math.inf))

    def _layers(self, model: nn.Module) -> dict[str, str]:
        """The layers whose routing is saved → ``layer_<i>_<linear module>``."""
        matches = {name: re.search(r"(?:^|\.)layers\.(\d+)\.(.+)", name) for name in layers_with_router(model)}
        parts = {name: (match[1], match[2]) for name, match in matches.items() if match}
        wanted = self.linear_module_names
        missing = [name for name in wanted or [] if name not in {module for _, module in parts.values()}]
        if missing or not parts:
            found = ", ".join(dict.fromkeys(module for _, module in parts.values())) or "none"
            problem = f"no layer {missing[0]!r} with a router" if missing else "the model has no layers with a router"
            raise PlanError(f"layer_wise_routing_weights_save_path: {problem}; there are: {found}")
        return {name: f"layer_{i}_{module}" for name, (i, module) in parts.items() if not wanted or module in wanted}

    def on_task_evaluation_end(self) -> None:
        """Save what was recorded of the task."""
        super().on_task_evaluation_end()
        self._recording.close()

    @torch.no_grad()
    def _evaluate(
        self, classifier: Any, test_loader: DataLoader, num_classes: int, task_name: str | None = None
    ) -> dict[str, float | int]:
        """Evaluate the framework's zero-shot classifier on one task; overrides the framework's loop.

        The loader gives batches of pixels (N, 3, H, W) and labels (N,) of this process. The result has ``accuracy``,
        from 0 to 1, mean cross-entropy ``loss`` in nats, and ``samples``, over all processes.
        """
        classifier.eval()
        batches = itertools.islice(test_loader, 1) if self.fast_dev_run else test_loader
        totals = torch.zeros(3, dtype=torch.float64, device=self.fabric.device)  # correct, loss, samples
        own_samples, offset = _own_samples(test_loader), 0  # offset of the batch among the samples of this process
        for inputs, targets in tqdm(batches, desc=f"Evaluating {task_name}", leave=False, dynamic_ncols=True):
            outputs = classifier(inputs, return_image_embeds=True, return_dict=True, task_name=task_name)
            logits = outputs["logits"].float()
            targets = targets.to(logits.device)
            counted = torch.arange(offset, offset + len(targets), device=logits.device) < own_samples
            correct = (logits.argmax(dim=-1) == targets)[counted]
            losses = F.cross_entropy(logits, targets, reduction="none")[counted]
            totals += torch.stack([correct.sum(), losses.double().sum(), counted.sum()]).to(totals)
            offset += len(targets)
        destroy_process_group_at_exit()
        total_correct, total_loss, samples = self.fabric.all_reduce(totals, reduce_op="sum").tolist()
        if not samples:
            raise SmileError(f"the test set of {task_name} is empty")
        # further digits of the loss depend on how the samples are batched
        return {"accuracy": total_correct / samples, "loss": round(total_loss / samples, 3), "samples": int(samples)}


@contextmanager
def save_scores(model: nn.Module, files: Mapping[str, Path], limit: float) -> Iterator[None]:
    """Save the routers' scores of layers at the end of the ``with`` block: layer → file, with a tensor (tokens, T).

    At most `limit` tokens are saved for each layer. Where experts are chosen for whole inputs, these take the place of
    tokens.
    """
    scores: dict[str, list[Tensor]] = {name: [] for name in files}

    def record(name: str, event: RoutingEvent) -> None:
        room = limit - sum(map(len, scores.get(name, [])))
        if name in files and room > 0:
            rows = event.scores.detach().reshape(-1, event.scores.shape[-1])
            scores[name].append(rows[: int(min(room, len(rows)))].cpu())

    with observe_routing(model, record):
        yield
    for name, parts in scores.items():
        if parts:
            files[name].parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.cat(parts), files[name])


def _own_samples(loader: DataLoader) -> float:
    """The number of samples of this process before those that repeat others to give every process the same number."""
    sampler = loader.sampler
    if not isinstance(sampler, DistributedSampler):
        return math.inf
    return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
