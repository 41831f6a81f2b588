"""The framework's CLIP task pool, exact on any number of processes."""

import itertools
import math
from typing import Any

import torch
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler
from tqdm.auto import tqdm

from ...construction import destroy_process_group_at_exit
from ...exceptions import SmileError


class ExactCLIPVisionModelTaskPool(CLIPVisionModelTaskPool):
    """The framework's CLIP task pool with every sample counted once, on any number of processes.

    The framework's own pool repeats samples to give every process the same number, and keeps its counts on the CPU,
    where NCCL can't reduce them. Here each process sums correct answers and losses over samples that are no repetition,
    and three numbers for each task are reduced on the device. The report has the number of samples of each task.
    """

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


def _own_samples(loader: DataLoader) -> float:
    """The number of samples of this process before those that repeat others to give every process the same number."""
    sampler = loader.sampler
    if not isinstance(sampler, DistributedSampler):
        return math.inf
    return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
