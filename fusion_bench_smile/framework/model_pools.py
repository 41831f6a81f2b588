"""Entries of a model pool as the laziest sources (weight files, LoRA adapter, model), and its calibration inputs."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from fusion_bench.modelpool.base_pool import BaseModelPool
from huggingface_hub import try_to_load_from_cache
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from .. import io
from ..exceptions import PlanError, SmileError

PRETRAINED = "_pretrained_"
LORA_LOADER = "fusion_bench.modelpool.seq2seq_lm.modelpool.load_lora_model"
# options of ``from_pretrained`` that leave the tensors of the files as they are, up to their dtype
PLAIN_OPTIONS = {"_target_", "pretrained_model_name_or_path", "torch_dtype", "dtype"}
FULL_PRECISION = {"float32", "float", "float64"}
BATCH_SIZE = 32
# input of a model → what goes with it
INPUTS = {"pixel_values": (), "input_ids": ("attention_mask", "token_type_ids")}
ModelInputs = dict[str, Tensor]


def expert_source(pool: BaseModelPool, name: str, pretrained: nn.Module) -> io.ExpertSource:
    """An expert of a pool as a source for `upscale`, for the loaded pretrained model of the pool. No tensor is read.

    - An entry whose loader has a `lazy_source` becomes that source.
    - A LoRA adapter on the pool's pretrained model becomes its folder, so that its factors are read.
    - A local folder or a cached hub snapshot becomes its safetensors files.
    - All other entries become a function that loads the model. Among them are entries whose loader would convert the
      files to another dtype than that of the pretrained model.

    Raises PlanError for files that can't be read, SmileError for arguments that the loader's `lazy_source` refuses.
    """
    entry = pool._models[name]
    if isinstance(entry, nn.Module):
        return entry
    options = _options_of(entry)
    source = _lazy_source(options) or _adapter_folder(pool, options) or _weight_files(pool, options, pretrained)
    return source or partial(load_model, pool, name)


def load_model(pool: BaseModelPool, name: str) -> nn.Module:
    """A pool's model, loaded by the framework. Raises PlanError with the entry's name, or the loader's SmileError."""
    entry = pool._models[name]
    path = str(_options_of(entry).get("pretrained_model_name_or_path") or "")
    if path.startswith(("/", "./", "../", "~")) and not Path(path).expanduser().exists():
        raise PlanError(f"model {name!r} of the pool: the folder {path} does not exist; correct its path")
    try:
        return pool.load_model(name)
    except SmileError:
        raise
    except Exception as error:
        raise PlanError(f"model {name!r} of the pool ({path or entry}) can't be loaded: {error}") from error


def _options_of(entry: Any) -> dict[str, Any]:
    """The options of an entry; a path or hub name stands for a call of ``from_pretrained``."""
    if isinstance(entry, str):
        return {"_target_": "transformers.AutoModel.from_pretrained", "pretrained_model_name_or_path": entry}
    if isinstance(entry, DictConfig):
        return cast("dict[str, Any]", OmegaConf.to_container(entry, resolve=True))
    return dict(entry) if isinstance(entry, Mapping) else {}


def _lazy_source(options: Mapping[str, Any]) -> io.ExpertSource | None:
    """The source that an entry's loader names for its arguments, see `lazy_source`."""
    try:
        loader = get_method(options["_target_"])
    except Exception:  # the message follows when the model is loaded
        return None
    source = getattr(loader, "lazy_source", None)
    return source and source(**{key: value for key, value in options.items() if key != "_target_"})


def _adapter_folder(pool: BaseModelPool, options: Mapping[str, Any]) -> Path | None:
    """The folder of a LoRA adapter that the framework would merge into the pool's pretrained model."""
    base = _options_of(pool._models.get(PRETRAINED)).get("pretrained_model_name_or_path")
    merged = options.get("merge_and_unload") is not False
    if options.get("_target_") != LORA_LOADER or options.get("base_model_path") != base or not merged:
        return None
    folder = _local_folder(str(options["peft_model_path"]), [io.ADAPTER_CONFIG])
    return folder if (folder / io.ADAPTER_WEIGHTS).exists() else None


def _weight_files(
    pool: BaseModelPool, options: Mapping[str, Any], pretrained: nn.Module
) -> Path | io.SafetensorsSource | None:
    """The files of an entry, read into the dtypes of the loaded model; None where loading does more than that."""
    if not _is_plain(pool, options):
        return None
    path, files = str(options["pretrained_model_name_or_path"]), (io.WEIGHTS_FILE, io.INDEX_FILE)
    folder = _local_folder(path, files if path.count("/") <= 1 else ())
    if not any((folder / name).exists() for name in files):
        return None
    requested = _requested_dtypes(pool, options)
    full_precision = next(pretrained.parameters()).dtype in (torch.float32, torch.float64)
    if full_precision and FULL_PRECISION.issuperset(requested):  # loading rounds no tensor
        return folder
    of_pretrained = _requested_dtypes(pool, _options_of(pool._models[PRETRAINED]))
    if requested and requested == of_pretrained and "auto" not in requested:
        state = pretrained.state_dict()
        dtypes = {name: tensor.dtype for name, tensor in state.items()}
        return io.SafetensorsSource(folder, dtypes, io.StateDictSource(state).shapes(), io.tied_names(pretrained))
    return None


def _is_plain(pool: BaseModelPool, options: Mapping[str, Any]) -> bool:
    """Whether an entry is loaded by ``from_pretrained`` of transformers, with no option but a dtype."""
    is_plain_call = str(options.get("_target_", "")).endswith(".from_pretrained") and set(options) <= PLAIN_OPTIONS
    from_hub = getattr(pool, "_platform", "hf") in ("hf", "huggingface")
    return is_plain_call and from_hub and all("dtype" in key for key in _model_kwargs(pool))


def _model_kwargs(pool: BaseModelPool) -> Mapping[str, Any]:
    """Arguments that a pool of language models adds to every ``from_pretrained``."""
    return getattr(pool, "_model_kwargs", None) or getattr(pool, "model_kwargs", None) or {}


def _requested_dtypes(pool: BaseModelPool, options: Mapping[str, Any]) -> list[str]:
    """The dtypes that an entry or its pool requests, without ``torch.``; empty for the default of the loader."""
    settings = {**_model_kwargs(pool), **{key: value for key, value in options.items() if "dtype" in key}}
    return [str(value).removeprefix("torch.") for value in settings.values() if value is not None]


def _local_folder(path: str, cached_files: Sequence[str]) -> Path:
    """A local folder, or the cached snapshot of a hub name with one of some files; the path itself without either."""
    folder = Path(path).expanduser()
    cached = [] if folder.is_dir() else [try_to_load_from_cache(path, name) for name in cached_files]
    return next((Path(file).parent for file in cached if isinstance(file, str)), folder)


def calibration_inputs(pool: BaseModelPool, experts: Sequence[str], count: int) -> dict[str, list[ModelInputs]]:
    """Unlabelled inputs of each expert's training set, for `calibrate`: expert → batches of keyword arguments.

    The same `count` examples are drawn in every run. An example has what the model takes (``pixel_values``,
    ``input_ids``), or an image in a pool with a processor.
    Raises PlanError naming the expert without training set, or with examples of an unknown form.
    """
    inputs = {}
    for expert in experts:
        if expert not in (getattr(pool, "_train_datasets", None) or {}):
            raise PlanError(
                f"calibration={count} needs train_datasets.{expert} in the model pool, from which it draws inputs; "
                "add it, or use calibration=0"
            )
        dataset: Any = pool.load_train_dataset(expert)
        numbers = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
        inputs[expert] = list(_batches([model_inputs(pool, dataset[number], expert) for number in numbers]))
    return inputs


def model_inputs(pool: BaseModelPool, example: Any, expert: str) -> ModelInputs:
    """One training example as keyword arguments of the model, with a batch dimension of 1 and without its label.

    An example is a mapping, or a pair of image and label. The pool's processor prepares images. Raises PlanError,
    which names the expert, if the example has no known input.
    """
    values = example if isinstance(example, Mapping) else dict(zip(("image", "label"), example, strict=False))
    for name, masks in INPUTS.items():
        if name in values:
            return {key: torch.as_tensor(values[key])[None] for key in (name, *masks) if key in values}
    if "image" in values and hasattr(pool, "load_processor"):
        return dict(pool.load_processor()(images=values["image"], return_tensors="pt"))
    raise PlanError(
        f"calibration: the training examples of {expert!r} have {', '.join(map(str, values))}; one of "
        f"{', '.join(INPUTS)}, or an image in a pool with a processor is needed"
    )


def _batches(examples: Sequence[ModelInputs]) -> Iterator[ModelInputs]:
    """Batches of neighbours with the same names and shapes, which need no padding."""
    for _, group in groupby(examples, lambda example: [(name, value.shape) for name, value in example.items()]):
        alike = list(group)
        for start in range(0, len(alike), BATCH_SIZE):
            batch = alike[start : start + BATCH_SIZE]
            yield {name: torch.cat([example[name] for example in batch]) for name in batch[0]}
