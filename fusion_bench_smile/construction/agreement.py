"""Agreement of processes: those that build one model together must have the same models and options."""

from collections.abc import Iterable, Mapping

import xxhash

from ..config import SmileConfig
from ..exceptions import PlanError
from ..io import Source
from .parallel import WorkPartition

DEVICES = ("device", "upscaling_accelerator")  # options in which processes may differ


def check_same_options(
    partition: WorkPartition, config: SmileConfig, calibration: int, experts: Iterable[str]
) -> None:  # fmt: skip
    """Raise PlanError in all processes if the options or the experts' names of one differ from those of process 0."""
    options = {name: value for name, value in config.to_dict().items() if name not in DEVICES}
    _compare(partition, {"the options": repr((options, calibration)), "the experts' names": repr(list(experts))})


def check_same_models(partition: WorkPartition, pretrained: Source, experts: Mapping[str, Source | None]) -> None:
    """Raise PlanError in all processes if the weights of one differ from those of process 0.

    Files that are the same on all processes are not read. Experts that have to be loaded, which are None here, are
    compared by `check_same_experts`.
    """
    if partition.size == 1:
        return
    kinds = {_label(name): "loaded" if source is None else "read" for name, source in experts.items()}
    _compare(partition, {"the pretrained model": pretrained.digest(), **kinds})
    sources = {_label(name): source for name, source in experts.items() if source is not None}
    stamps = partition.all_gather({label: repr(source.stamp()) for label, source in sources.items()})
    same = [label for label in sources if len({stamp[label] for stamp in stamps}) == 1 and stamps[0][label] != "None"]
    _compare(partition, {label: source.digest() for label, source in sources.items() if label not in same})


def check_same_experts(partition: WorkPartition, digests: Mapping[str, str]) -> None:
    """Raise PlanError in all processes if an expert that each of them loaded has other weights than in process 0."""
    _compare(partition, {_label(name): digest for name, digest in digests.items()})


def _compare(partition: WorkPartition, values: Mapping[str, str]) -> None:
    digests = {label: xxhash.xxh3_128(value.encode(errors="replace")).hexdigest() for label, value in values.items()}
    first, *others = partition.all_gather(digests)
    for rank, other in enumerate(others, start=1):
        if different := [label for label in first if other.get(label) != first[label]]:
            raise PlanError(
                f"{different[0]}: process {rank} has others than process 0; give all processes the same models and "
                "options, and on several machines the same files"
            )


def _label(expert: str) -> str:
    return f"the weights of expert {expert!r}"
