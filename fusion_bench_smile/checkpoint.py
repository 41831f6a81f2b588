"""Save and load: an upscaled transformers model by plain ``save_pretrained`` and ``from_pretrained``.

transformers lets quantizers swap modules before the weights are loaded; SMILE registers itself there. So the folder is
an ordinary one: ``config.json`` carries a section with the layers, the weights are ordinary safetensors files. Any
other module is saved as ``model.safetensors`` and ``smile.json``, and loaded into its pretrained model.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import tempfile
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save_model as save_safetensors
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .config import SmileConfig
from .errors import CheckpointError, PlanError
from .kin import routed_class
from .layers import Routed, SmileLayout
from .own import give, owned
from .prototypes import Prototypes
from .recipe import MARK, Recipe, model_card
from .scopes import ROUTER, InputRouter
from .sources import FilesSource

log = logging.getLogger(__name__)


class Method(str, Enum):
    """The name of the section; an enumeration, because older transformers read its ``value``."""

    SMILE = "smile"


METHOD = Method.SMILE.value
FORMAT_VERSION = 3
COMPANIONS = {".json", ".txt", ".model", ".jinja"}
PLAIN_FILE, CARD = "smile.json", "README.md"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
HINT = "pip install fusion-bench-smile, and import fusion_bench_smile before from_pretrained"


class SmileSection(QuantizationConfigMixin):
    """The SMILE section of ``config.json``.

    Attributes:
        layers: layer name → its layout (`SmileLayout.to_dict`).
        experts: the experts' names, in the order of the layouts.
        options: the options it was built with (`SmileConfig.to_dict`).
        recipe: what it was made of (`Recipe.to_dict`).
        router: what decides for whole inputs beside scope and options: ``baseline``, whether there is one, and
            ``prototypes``, their number of features and directions.
        own: module → its parameters that experts own.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]],
        experts: list[str] | None = None,
        options: dict[str, Any] | None = None,
        recipe: dict[str, Any] | None = None,
        router: dict[str, Any] | None = None,
        own: dict[str, list[str]] | None = None,
        format_version: int = FORMAT_VERSION,
        needs: str = HINT,
        **kwargs: Any,
    ) -> None:
        self.quant_method = Method.SMILE  # type: ignore[assignment]
        self.layers = layers
        self.experts = experts or []
        self.options = options or {}
        self.recipe = recipe or {}
        self.router = router or {}
        self.own = own or {}
        self.format_version = format_version
        self.needs = needs

    @property
    def layouts(self) -> dict[str, SmileLayout]:
        return {name: SmileLayout.from_dict(values) for name, values in self.layers.items()}

    def prepare(self, model: nn.Module) -> None:
        """Give a pretrained model the layers, the router and the parameters that this describes, all zero.

        Raises:
            CheckpointError: if the model has no such layer.
        """
        for name, layout in self.layouts.items():
            try:
                plain = model.get_submodule(name)
            except AttributeError:
                config = getattr(model, "config", None)
                wanted = ", ".join(getattr(config, "architectures", None) or ["the class it was saved from"])
                raise CheckpointError(
                    f"{type(model).__name__} has no layer {name}; load this checkpoint with {wanted}"
                ) from None
            model.set_submodule(name, routed_class(plain).around(plain, layout))
        options = SmileConfig.recorded(self.options)
        if options.routing_scope == "token":
            return
        count = len(self.experts)
        router = InputRouter(options.routing_scope, count, options.top_k, options.refuse_unknown)
        if self.router.get("baseline"):
            router.set_baseline(torch.zeros(2, count))
        if self.router.get("prototypes"):
            router.prototypes = Prototypes(count, *self.router["prototypes"])
        router.attach(model)
        zeros: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameters in self.own.items():
            values = {parameter: getattr(model.get_submodule(name), parameter) for parameter in parameters}
            zeros[name] = {parameter: value.new_zeros(count, *value.shape) for parameter, value in values.items()}
        give(model, router, zeros)


class SmileLoader(HfQuantizer):
    """Builds the routed layers when transformers loads a model with a SMILE section."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        _check_version(cast(SmileSection, self.quantization_config).format_version, "this checkpoint")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        section = cast(SmileSection, self.quantization_config)
        section.prepare(model)
        folder = Path(getattr(model.config, "_name_or_path", "") or "")
        if folder.is_dir():
            check_tensors(folder, _required_shapes(model))

    def update_missing_keys(self, model: PreTrainedModel, missing_keys: list[str], prefix: str) -> list[str]:
        missing = [key for key in missing_keys if not is_tied(model, key)]
        if missing:  # transformers would fill them with random numbers and go on
            raise CheckpointError(f"{len(missing)} tensors are missing from the checkpoint (first: {missing[0]})")
        return missing_keys

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # SMILE is no quantization: the mark would make .half(), .to() and training refuse
        model.is_quantized = False  # type: ignore[assignment]
        model.__dict__.pop("hf_quantizer", None)
        model.__dict__.pop("quantization_method", None)
        _save_atomically(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


# what register_quantization_config and register_quantizer do; those don't exist before transformers 4.50
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SmileSection
AUTO_QUANTIZER_MAPPING[METHOD] = SmileLoader


def describe(model: nn.Module, config: SmileConfig, recipe: Recipe) -> None:
    """Write down in an upscaled model what it is, so that saving it needs nothing else."""
    layers = {n: m.layout.to_dict() for n, m in model.named_modules() if isinstance(m, Routed)}
    section = make_section(layers, config, recipe)
    router = getattr(model, ROUTER, None)
    if isinstance(router, InputRouter):
        of = router.prototypes
        shape = None if of is None else [len(of.scale), len(of.variances)]
        section.router = {"baseline": router.baseline is not None, "prototypes": shape}
        section.own = owned(model)
    if isinstance(model, PreTrainedModel):
        model.config.quantization_config = section
        _save_atomically(model)
    else:
        model.smile_section = section  # type: ignore[assignment]


def make_section(layers: dict[str, dict[str, Any]], config: SmileConfig, recipe: Recipe) -> SmileSection:
    """The section that describes these layouts."""
    options = json.loads(json.dumps(config.to_dict()))
    return SmileSection(layers, list(recipe.sources), options, recipe.to_dict())


def write_card(section: SmileSection, target: Path, folder: Path, base: str) -> None:
    """Write the model card of what becomes the folder `target`, unless somebody wrote another one there.

    Args:
        folder: where it is written.
        base: the pretrained model's path, or its name on a hub.
    """
    old = target / CARD
    if old.exists() and MARK not in old.read_text(errors="replace"):
        return
    on_hub = bool(base) and not Path(base).exists() and HUB_NAME.fullmatch(base) is not None
    recipe = Recipe.from_dict(section.recipe)
    card = model_card(recipe, section.experts, section.options, base if on_hub else None, section.needs)
    (folder / CARD).write_text(card)


def section_of(model: nn.Module) -> SmileSection:
    """The SMILE section of an upscaled model.

    Raises:
        CheckpointError: if the model has none.
    """
    holder = model.config if isinstance(model, PreTrainedModel) else model
    section = getattr(holder, "quantization_config", None) or getattr(holder, "smile_section", None)
    if isinstance(section, dict) and section.get("quant_method") == METHOD:
        section = SmileSection(**{k: v for k, v in section.items() if k != "quant_method"})
    if not isinstance(section, SmileSection):
        raise CheckpointError(f"this {type(model).__name__} was not made by upscale(); there is no SMILE model to save")
    return section


def save(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write an upscaled model into the folder `path`: complete, or not at all.

    Everything is written into a folder beside it, which is then renamed. An existing folder is replaced only by a
    complete one; files in it that are no weights (a tokenizer, a README) are carried along, and so are those that lie
    beside the pretrained model's weights. Of several processes, the one of rank 0 writes.

    Args:
        kwargs: passed to ``save_pretrained`` of a transformers model.

    Raises:
        CheckpointError: if the folder can't be written, or the model was not made by `upscale`.
    """
    section = section_of(model)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    with replaced_folder(Path(path)) as folder:
        if isinstance(model, PreTrainedModel):
            type(model).save_pretrained(model, folder, **kwargs)
        else:
            save_safetensors(model, str(folder / "model.safetensors"))
            (folder / PLAIN_FILE).write_text(json.dumps(section.to_dict(), indent=1))
        base = getattr(getattr(model, "config", None), "_name_or_path", "")
        write_card(section, Path(path), folder, base)
        source = _local_folder(base)
        if source is not None:
            copy_companions(source, folder)


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, image processor, generation settings: every small file that is neither weights nor the config.

    What `target` has already stays as it is.
    """
    for file in source.iterdir():
        small = file.is_file() and file.suffix in COMPANIONS
        if small and ".index." not in file.name and file.name != "config.json" and not (target / file.name).exists():
            (target / file.name).write_bytes(file.read_bytes())


def _local_folder(name: str) -> Path | None:
    """Where the files of a pretrained model lie, if they do: its folder, or its snapshot in the hub's cache."""
    if name and Path(name).is_dir():
        return Path(name)
    cached = try_to_load_from_cache(name, "config.json") if HUB_NAME.fullmatch(name) else None
    return Path(cached).parent if isinstance(cached, str) else None


def load(path: str | os.PathLike[str], pretrained: nn.Module | None = None) -> nn.Module:
    """Load an upscaled model from a folder that `save` or ``save_pretrained`` wrote.

    Args:
        pretrained: for a model that is not of transformers, its pretrained model (copied, never modified).

    Raises:
        CheckpointError: if the folder is not a complete SMILE checkpoint; it says what is wrong.
    """
    folder = Path(path)
    section, config = read_section(folder)
    if config is not None:
        check_tensors(folder, {})  # readable at all? the loader itself compares names and shapes
        return architecture(folder, config.get("architectures")).from_pretrained(folder)
    if pretrained is None:
        raise CheckpointError(f"{folder} holds no transformers model: give the pretrained model it was built from")
    model = deepcopy(pretrained)
    section.prepare(model)
    check_tensors(folder, {name: tuple(tensor.shape) for name, tensor in model.named_parameters()})
    load_safetensors(model, folder / "model.safetensors")
    model.smile_section = section  # type: ignore[assignment]
    return model


def architecture(folder: Path, names: Sequence[str] | None) -> type[PreTrainedModel]:
    """The transformers class that a folder's config.json names.

    Raises:
        CheckpointError: if there is no such class.
    """
    name = (names or [""])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise CheckpointError(f"{folder}: config.json names the architecture {name!r}, which transformers lacks")
    return model_class


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether something lies at `path` that should be a SMILE checkpoint (it may still be an incomplete one)."""
    return Path(path).is_dir() and any(Path(path).iterdir())


def read_section(folder: Path) -> tuple[SmileSection, dict[str, Any] | None]:
    """The SMILE section of a folder, and the transformers config around it (None for other modules).

    Raises:
        CheckpointError: if there is none.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; a SMILE checkpoint is one")
    for file in (folder / PLAIN_FILE, folder / "config.json"):
        if not file.exists():
            continue
        try:
            values = json.loads(file.read_text())
        except ValueError as error:
            raise CheckpointError(f"{file} is not readable JSON: {error}") from None
        config = values if file.name == "config.json" else None
        section = values.get("quantization_config", {}) if config is not None else values
        if section.get("quant_method") != METHOD:
            raise CheckpointError(f"{file} has no SMILE section: this is a checkpoint of another model")
        _check_version(section.get("format_version", 0), str(folder))
        return SmileSection(**{k: v for k, v in section.items() if k != "quant_method"}), config
    raise CheckpointError(f"{folder} holds neither config.json nor {PLAIN_FILE}: it is not a complete SMILE checkpoint")


def check_tensors(folder: Path, required: dict[str, tuple[int, ...]]) -> None:
    """Compare the safetensors files of a folder with the tensors a model needs, reading their headers alone.

    Raises:
        CheckpointError: naming the missing or unreadable file, or the first tensor that is missing or of another shape.
    """
    try:
        found = FilesSource(folder).shapes()
    except PlanError as error:
        raise CheckpointError(f"{error}; this is no complete SMILE checkpoint") from None
    missing = [name for name in required if name not in found]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(required)} tensors (first: {missing[0]})")
    for name, shape in required.items():
        if found[name] != shape:
            raise CheckpointError(f"{folder}: {name} has the shape {found[name]}, its config says {shape}")


def _required_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters() if not is_tied(model, n)}


def is_tied(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers fills `name` from another tensor: checkpoints leave it out."""
    patterns: Iterable[str] = model._tied_weights_keys or []  # a list, or from transformers 5 on a dict
    return any(re.search(pattern, name) for pattern in patterns)


def _check_version(version: int, where: str) -> None:
    if version != FORMAT_VERSION:
        remedy = "upgrade fusion-bench-smile" if version > FORMAT_VERSION else "build the model again"
        raise CheckpointError(f"{where} has format version {version}, this package reads {FORMAT_VERSION}: {remedy}")


def _save_atomically(model: PreTrainedModel) -> None:
    """Make ``model.save_pretrained`` (which the framework calls) write like `save`.

    Bound to the instance: the class stays the one transformers knows. Copies are bound to themselves; a pickled model
    comes back with its class's own method.
    """

    @functools.wraps(type(model).save_pretrained)
    def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        save(self, save_directory, **kwargs)

    save_pretrained.__name__ = save_pretrained.__qualname__ = "save_pretrained"
    model.save_pretrained = types.MethodType(save_pretrained, model)  # type: ignore[method-assign]


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, and put it in the place of `path` if the block succeeds.

    Raises:
        CheckpointError: if nothing can be written there.
    """
    path = Path(os.path.abspath(path))
    check_writable(path)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    old = folder.with_suffix(".old")
    try:
        yield folder
        for kept in path.iterdir() if path.exists() else ():
            if not re.search(r"\.(safetensors|bin)(\.index\.json)?$", kept.name) and not (folder / kept.name).exists():
                shutil.copytree(kept, folder / kept.name) if kept.is_dir() else shutil.copy2(kept, folder / kept.name)
        folder.chmod(0o777 & ~_umask())
        if path.exists():
            path.rename(old)
        folder.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Refuse a checkpoint folder that can't be written, before any work is done for it.

    Raises:
        CheckpointError: naming the folder and the reason.
    """
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; a checkpoint needs a folder: choose another path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent):
            pass
    except OSError as error:
        raise CheckpointError(
            f"nothing can be written to {path.parent}: {error.strerror}; choose another path"
        ) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
