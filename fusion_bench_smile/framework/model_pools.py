"""Entries of a model pool as the laziest sources (weight files, LoRA adapter, model), and its calibration inputs."""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from fusion_bench.modelpool.base_pool import BaseModelPool
from fusion_bench.utils.lazy_state_dict import LazyStateDict
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from .. import io
from ..exceptions import PlanError, SmileError

PRETRAINED = "_pretrained_"
# options of ``from_pretrained`` that leave the tensors of the files as they are, up to their dtype
PLAIN_OPTIONS = {"_target_", "pretrained_model_name_or_path", "torch_dtype", "dtype"}
# options of loaders of a whole model that are a folder or a name on the hub
BASE_OPTIONS = ("pretrained_model_name_or_path", "model_name")
FULL_PRECISION = {"float32", "float", "float64"}
BATCH_SIZE = 32
# input of a model → what goes with it
INPUTS = {"pixel_values": (), "input_ids": ("attention_mask", "token_type_ids")}
ModelInputs = dict[str, Tensor]


class LoraLoader(NamedTuple):
    """A loader of the framework that merges a LoRA adapter into a base model."""

    base: str  # name of its option for the base model
    adapter: str  # name of its option for the adapter
    merges: bool  # the default of ``merge_and_unload``


LORA_LOADERS = {
    "fusion_bench.modelpool.seq2seq_lm.modelpool.load_lora_model": LoraLoader(
        "base_model_path", "peft_model_path", True
    ),
    "fusion_bench.models.linearized.vision_model.load_lora_vision_model_hf": LoraLoader(
        "base_model_name", "peft_name", False
    ),
}


def expert_source(pool: BaseModelPool, name: str, pretrained: nn.Module) -> io.ExpertSource:
    """An expert of a pool as a source for `upscale`, for the loaded pretrained model of the pool. No tensor is read.

    - An entry whose loader has a `lazy_source` becomes that source.
    - A LoRA adapter on the pool's pretrained model becomes its folder, so that its factors are read.
    - A folder or a model on the hub, which is downloaded, becomes its weight files. So does the framework's
      `LazyStateDict`.
    - All other entries become a function that loads the model. Among them are entries whose loader would convert the
      files to another dtype than that of the pretrained model.

    Raises PlanError for files that can't be read, SmileError for arguments that the loader's `lazy_source` refuses.
    """
    entry = pool._models[name]
    if isinstance(entry, nn.Module):
        return entry
    if isinstance(entry, LazyStateDict):
        return _lazy_state_dict(entry, pretrained)
    options = _options_of(pool, name)
    try:
        source = _lazy_source(options) or _adapter_folder(pool, options) or _weight_files(pool, options, pretrained)
    except PlanError as error:
        raise PlanError(f"model {name!r} of the pool: {error}") from error
    return source or partial(load_model, pool, name)


def is_adapter(source: io.ExpertSource) -> bool:
    """Whether a source is the folder of a LoRA adapter."""
    return isinstance(source, Path) and (source / io.ADAPTER_CONFIG).exists()


def load_model(pool: BaseModelPool, name: str) -> nn.Module:
    """A pool's model, loaded by the framework, also in a pool with lazy loading.

    Raises PlanError with the entry's name, or the loader's SmileError.
    """
    options = _options_of(pool, name)
    path = next((options[option] for option in BASE_OPTIONS if option in options), pool._models.get(name))
    if getattr(pool, "enable_lazy_loading", False):
        pool = copy(pool)
        pool.enable_lazy_loading = False  # type: ignore[attr-defined]
    entry = pool._models[name]
    try:
        model = entry if isinstance(entry, LazyStateDict) else pool.load_model(name)
    except SmileError:
        raise
    except Exception as error:
        raise PlanError(
            f"model {name!r} of the pool ({path or pool._models[name]}) can't be loaded: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise PlanError(f"model {name!r} of the pool is a {type(model).__name__}: give its class, as CausalLMPool does")
    return model


def _options_of(pool: BaseModelPool, name: str) -> dict[str, Any]:
    """The options of an entry; a path or hub name stands for a call of ``from_pretrained``.

    Raises PlanError for an option without a value, and for a folder that does not exist.
    """
    entry = pool._models.get(name)
    if isinstance(entry, str):
        entry = {"_target_": "transformers.AutoModel.from_pretrained", "pretrained_model_name_or_path": entry}
    try:
        plain = (
            OmegaConf.to_container(entry, resolve=True, throw_on_missing=True)
            if isinstance(entry, DictConfig)
            else entry
        )
        options = cast("dict[str, Any]", dict(plain) if isinstance(plain, dict) else {})
        for path in _paths(options):
            io.existing_path(path)
    except (OmegaConfBaseException, PlanError) as error:
        raise PlanError(f"model {name!r} of the pool: {str(error).partition(chr(10))[0]}") from error
    return options


def _paths(options: Mapping[str, Any]) -> list[str]:
    """The folders, or names on the hub, that the loader of an entry reads."""
    target = str(options.get("_target_"))
    loader = LORA_LOADERS.get(target)
    names = [loader.base, loader.adapter] if loader else ["pretrained_model_name_or_path"]
    if not loader and not target.endswith(".from_pretrained"):
        return []
    paths = [options[name] for name in names if isinstance(options.get(name), str)]
    return [path for path in paths if "://" not in path]  # the framework's prefixes of platforms


def _lazy_source(options: Mapping[str, Any]) -> io.ExpertSource | None:
    """The source that an entry's loader names for its arguments, see `lazy_source`."""
    try:
        loader = get_method(options["_target_"])
    except Exception:  # the message follows when the model is loaded
        return None
    source = getattr(loader, "lazy_source", None)
    return source and source(**{key: value for key, value in options.items() if key != "_target_"})


def _adapter_folder(pool: BaseModelPool, options: Mapping[str, Any]) -> Path | None:
    """The folder of a LoRA adapter that the framework would merge into the pool's pretrained model.

    The loader of CLIP's vision towers adapts the inner module, which it also returns unless it is asked for the tower.
    """
    loader = LORA_LOADERS.get(str(options.get("_target_")))
    if loader is None or not options.get("merge_and_unload", loader.merges):
        return None
    of_pretrained = _options_of(pool, PRETRAINED)
    bases = [of_pretrained[option] for option in BASE_OPTIONS if option in of_pretrained]
    if options.get(loader.base) not in bases or not options.get("return_vision_model", True):
        return None
    folder = io.local_path(str(options[loader.adapter]))
    return folder if (folder / io.ADAPTER_CONFIG).exists() else None


def _weight_files(
    pool: BaseModelPool, options: Mapping[str, Any], pretrained: nn.Module
) -> Path | io.FileSource | None:
    """The files of an entry, read into the dtypes of the loaded model; None where loading does more than that."""
    if not _is_plain(pool, options):
        return None
    requested = _requested_dtypes(pool, options)
    full_precision = next(pretrained.parameters()).dtype in (torch.float32, torch.float64)
    keeps_dtypes = full_precision and FULL_PRECISION.issuperset(requested)  # loading rounds no tensor
    of_pretrained = _requested_dtypes(pool, _options_of(pool, PRETRAINED))
    if not keeps_dtypes and (not requested or requested != of_pretrained or "auto" in requested):
        return None
    folder = io.local_path(str(options["pretrained_model_name_or_path"]))
    if not any((folder / name).exists() for name in io.MODEL_FILES):
        return None
    return folder if keeps_dtypes else _open_as(folder, pretrained)


def _lazy_state_dict(state: LazyStateDict, pretrained: nn.Module) -> io.FileSource:
    """The files of the framework's lazy state dict, read into the dtypes of the loaded model."""
    return _open_as(io.local_path(state.checkpoint), pretrained)


def _open_as(folder: Path, pretrained: nn.Module) -> io.FileSource:
    state = pretrained.state_dict()
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    return io.open_weights(folder, dtypes, io.StateDictSource(state).shapes(), io.tied_names(pretrained))


def _is_plain(pool: BaseModelPool, options: Mapping[str, Any]) -> bool:
    """Whether an entry is loaded by ``from_pretrained`` of transformers, with no option but a dtype."""
    is_plain_call = str(options.get("_target_", "")).endswith(".from_pretrained") and set(options) <= PLAIN_OPTIONS
    from_hub = getattr(pool, "_platform", "hf") in ("hf", "huggingface")
    from_hub = from_hub and "://" not in str(options.get("pretrained_model_name_or_path"))
    return is_plain_call and from_hub and all("dtype" in key for key in _model_kwargs(pool))


def _model_kwargs(pool: BaseModelPool) -> Mapping[str, Any]:
    """Arguments that a pool of language models adds to every ``from_pretrained``."""
    return getattr(pool, "_model_kwargs", None) or getattr(pool, "model_kwargs", None) or {}


def _requested_dtypes(pool: BaseModelPool, options: Mapping[str, Any]) -> list[str]:
    """The dtypes that an entry or its pool requests, without ``torch.``; empty for the default of the loader."""
    settings = {**_model_kwargs(pool), **{key: value for key, value in options.items() if "dtype" in key}}
    return [str(value).removeprefix("torch.") for value in settings.values() if value is not None]


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
                f"calibration needs train_datasets.{expert} in the model pool, from which it draws inputs; "
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
