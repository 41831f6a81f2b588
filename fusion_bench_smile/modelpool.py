"""What a model pool's entry is, as the laziest source that fits it: files, an adapter, or the loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from fusion_bench.modelpool.base_pool import BaseModelPool
from huggingface_hub import try_to_load_from_cache
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from . import embedded
from .checkpoint import load
from .embedded import glue, text
from .ending import one_clear_line
from .errors import PlanError, SmileError
from .sources import ADAPTER_CONFIG, INDEX, SINGLE, FilesSource, Openable, StateSource, tied_names

CALIBRATION_BATCH = 32  # inputs
PATH_KEYS = {"_target_", "pretrained_model_name_or_path", "torch_dtype", "dtype"}
LORA_LOADER = "fusion_bench.modelpool.seq2seq_lm.modelpool.load_lora_model"
EMBEDDED_LOADERS: dict[str, Callable[..., Path]] = {
    f"{module.__name__}.load_expert": module.expert_folder for module in (embedded, glue, text)
}


def load_saved(path: str) -> nn.Module:
    """A saved SMILE checkpoint, for the pools under ``SmileCheckpoint``; see `load`."""
    with one_clear_line():
        return load(path)


def expert_of(pool: BaseModelPool, name: str, pretrained: nn.Module) -> Openable:
    """The expert `name` of a pool, for `upscale`: nothing is read yet.

    A local folder or cached hub snapshot becomes its files, a LoRA adapter on the pool's own pretrained model its
    factors. Anything else, also an entry whose files would be loaded in another dtype than the pretrained model's,
    becomes a function that loads the model.

    Raises:
        PlanError: for files that can't be read.
    """
    load = partial(load_model, pool, name)
    entry = pool._models[name]
    if isinstance(entry, nn.Module):
        return entry
    return _adapter_folder(pool, entry) or _files(pool, entry, pretrained) or load


def calibration_inputs(pool: BaseModelPool, names: Sequence[str], count: int) -> dict[str, list[dict[str, Tensor]]]:
    """Unlabelled inputs of each expert's training set in a pool, drawn always alike, as batches of model arguments.

    An example may be what the model takes (``pixel_values``, ``input_ids``), or an image in a pool with a processor.

    Raises:
        PlanError: naming the expert whose data the pool lacks, or has in a form that isn't known.
    """
    return {name: _some_inputs(pool, name, count) for name in names}


def _some_inputs(pool: BaseModelPool, name: str, count: int) -> list[dict[str, Tensor]]:
    if name not in (getattr(pool, "_train_datasets", None) or {}):
        raise PlanError(
            f"calibration={count} needs train_datasets.{name} in the model pool, from which inputs are taken; add it, "
            "or use calibration=0"
        )
    dataset: Any = pool.load_train_dataset(name)
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return list(_batched([inputs_of(pool, dataset[number], name) for number in drawn]))


def _batched(examples: Sequence[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Neighbours of one shape together, up to `CALIBRATION_BATCH`: one at a time takes many times as long."""

    def shapes(example: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
        return [(key, value.shape) for key, value in example.items()]

    for _, alike in groupby(examples, shapes):
        of_shape = list(alike)
        for start in range(0, len(of_shape), CALIBRATION_BATCH):
            part = of_shape[start : start + CALIBRATION_BATCH]
            yield {key: torch.cat([example[key] for example in part]) for key in part[0]}


def inputs_of(pool: BaseModelPool, example: Any, name: str) -> dict[str, Tensor]:
    """One example as arguments of the model, without its label."""
    values = example if isinstance(example, Mapping) else dict(zip(("image", "label"), example, strict=False))
    for key in ("pixel_values", "input_ids"):
        if key in values:
            masks = {k: values[k] for k in ("attention_mask", "token_type_ids") if k in values and key == "input_ids"}
            return {k: torch.as_tensor(v)[None] for k, v in {key: values[key], **masks}.items()}
    if "image" in values and hasattr(pool, "load_processor"):
        return dict(pool.load_processor()(images=values["image"], return_tensors="pt"))
    raise PlanError(
        f"calibration: the training examples of {name!r} have {', '.join(map(str, values))}; one of pixel_values, "
        "input_ids, or an image in a pool with a processor is needed"
    )


def load_model(pool: BaseModelPool, name: str) -> nn.Module:
    """A model of the pool, loaded by the framework.

    Raises:
        PlanError: naming the entry that can't be loaded.
    """
    entry = pool._models[name]
    where = _path_of(entry) or ""
    if where.startswith(("/", "./", "../", "~")) and not Path(where).expanduser().exists():
        raise PlanError(f"model {name!r} of the pool: the folder {where} does not exist; correct its path")
    try:
        return pool.load_model(name)
    except SmileError:
        raise
    except Exception as error:
        shown = where or entry
        raise PlanError(f"model {name!r} of the pool ({shown}) can't be loaded: {error}") from error


def _path_of(entry: Any) -> str | None:
    """The path or hub name of an entry that is one, or that is loaded by some ``from_pretrained``."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, (DictConfig, Mapping)):
        return entry.get("pretrained_model_name_or_path")
    return None


def _files(pool: BaseModelPool, entry: Any, pretrained: nn.Module) -> Path | FilesSource | None:
    """What reads from an entry's files what loading it would give."""
    options = _plain_options(entry)
    folder = _snapshot(str(options["pretrained_model_name_or_path"])) if _is_plain(pool, options) else None
    if folder is None:
        return None
    asked = _asked_dtypes(pool, options)
    if _keeps_precision(asked, pretrained):
        return folder
    if asked and asked == _asked_dtypes(pool, _plain_options(pool._models["_pretrained_"])) and "auto" not in asked:
        own = {name: tensor.dtype for name, tensor in pretrained.state_dict().items()}
        return FilesSource(folder, own, StateSource(pretrained.state_dict()).shapes(), tied_names(pretrained))
    return None


def _plain_options(entry: Any) -> Mapping[str, Any]:
    """The options of an entry; a path or hub name is what `from_pretrained` is given."""
    if isinstance(entry, str):
        return {"_target_": ".from_pretrained", "pretrained_model_name_or_path": entry}
    return entry if isinstance(entry, (DictConfig, Mapping)) else {}


def _is_plain(pool: BaseModelPool, options: Mapping[str, Any]) -> bool:
    """Whether an entry is loaded by ``from_pretrained``, with no option but a dtype."""
    plain = str(options.get("_target_", "")).endswith(".from_pretrained") and set(options) <= PATH_KEYS
    from_hub = getattr(pool, "_platform", "hf") in ("hf", "huggingface")
    return plain and from_hub and all("dtype" in key for key in _model_kwargs(pool))


def _model_kwargs(pool: BaseModelPool) -> Mapping[str, Any]:
    """What a pool of language models gives to every ``from_pretrained``."""
    return getattr(pool, "_model_kwargs", None) or getattr(pool, "model_kwargs", None) or {}


def _asked_dtypes(pool: BaseModelPool, options: Mapping[str, Any]) -> list[str]:
    """The dtypes that an entry or its pool asks for, without ``torch.``; none where the loader decides."""
    settings = {**_model_kwargs(pool), **{k: options[k] for k in options if "dtype" in k}}
    return [str(value).removeprefix("torch.") for value in settings.values() if value is not None]


def _keeps_precision(asked: Sequence[str], pretrained: nn.Module) -> bool:
    """Whether loading would round the files' tensors no further than the pretrained model's own were."""
    dtype = next(pretrained.parameters()).dtype
    return dtype in (torch.float32, torch.float64) and all(a in ("float32", "float", "float64") for a in asked)


def _snapshot(path: str) -> Path | None:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        cached = [try_to_load_from_cache(path, file) for file in (SINGLE, INDEX)] if path.count("/") <= 1 else []
        found = [Path(file).parent for file in cached if isinstance(file, str)]
        if not found:
            return None
        folder = found[0]
    return folder if (folder / SINGLE).exists() or (folder / INDEX).exists() else None


def _adapter_folder(pool: BaseModelPool, entry: Any) -> Path | None:
    if not isinstance(entry, (DictConfig, Mapping)):
        return None
    plain = OmegaConf.to_container(entry, resolve=True) if isinstance(entry, DictConfig) else entry
    options = dict(cast("dict[str, Any]", plain))
    target = options.pop("_target_", None)
    if target in EMBEDDED_LOADERS:
        return EMBEDDED_LOADERS[target](**options)
    same_base = options.get("base_model_path") == _path_of(pool._models.get("_pretrained_"))
    if target != LORA_LOADER or not same_base or options.get("merge_and_unload") is False:
        return None
    folder = Path(str(options["peft_model_path"])).expanduser()
    if not folder.is_dir():
        cached = try_to_load_from_cache(str(options["peft_model_path"]), ADAPTER_CONFIG)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder if (folder / "adapter_model.safetensors").exists() else None
