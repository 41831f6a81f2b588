"""Models and adapters on the hub: their weight files, from the local cache or downloaded."""

import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..exceptions import PlanError
from .file_source import indexed_files
from .text import shortened
from .weight_files import ADAPTER_CONFIG, ADAPTER_FILES, MODEL_FILES

COMPANIONS = ("*.json", "*.txt", "*.model")  # of a model's weights: its configuration, tokenizer and processor
LOCAL_STARTS = ("/", "./", "../", "~", os.sep)


def local_path(path: str | os.PathLike[str]) -> Path:
    """A folder or file that exists, or the folder of the weight files of a name on the hub; see `hub_folder`.

    Raises PlanError for a path that does not exist, and as `hub_folder`.
    """
    found = existing_path(path)
    return hub_folder(str(path)) if found is None else found


def existing_path(path: str | os.PathLike[str]) -> Path | None:
    """A folder or file that exists; None for what may be a name on the hub.

    Raises PlanError for a path that does not exist and cannot be such a name.
    """
    found = Path(path).expanduser()
    if found.exists():
        return found
    if not isinstance(path, str) or path.startswith(LOCAL_STARTS):
        raise PlanError(f"the folder {path} does not exist; correct its path")
    try:
        validate_repo_id(path)
    except HFValidationError:
        problem = f"{shortened(repr(path))} is neither a folder nor the name of a model on the hub"
        raise PlanError(f"{problem}; correct its path") from None
    return None


def hub_folder(name: str) -> Path:
    """The folder with the adapter, or else the weight files, of a model on the hub. What is missing is downloaded.

    Raises PlanError if it has no such files, or the hub does not answer.
    """
    file = _first_of(name, (ADAPTER_CONFIG, *MODEL_FILES))
    if file is not None and file.name == ADAPTER_CONFIG:
        file = _first_of(name, ADAPTER_FILES)
    if file is None:
        raise PlanError(f"{name} on the hub has no weight files that can be read one by one; load the model first")
    if file.name.endswith(".index.json"):
        for shard in sorted(indexed_files(file)):
            if _first_of(name, [shard]) is None:
                raise PlanError(f"{name} on the hub lacks {shard}, which its index names: the checkpoint is incomplete")
    return file.parent


def model_folder(name: str | os.PathLike[str]) -> Path:
    """The folder of a model with its config. If the name is one on the hub, both and its tokenizer are downloaded.

    Raises PlanError for a file, for a path that does not exist, and as `hub_folder`.
    """
    folder = existing_path(name)
    if folder is None:
        try:  # first, so that the weights are those of the same commit
            snapshot_download(str(name), allow_patterns=list(COMPANIONS))
        except Exception as error:  # no such model, no permission, no network and nothing in the cache
            raise _not_downloaded(str(name), error) from error
        folder = hub_folder(str(name))
    if not folder.is_dir():
        raise PlanError(f"{name} is a file: give the folder of the pretrained model, with its config.json")
    return folder


def _first_of(name: str, files: Iterable[str]) -> Path | None:
    """The first of some files that is in the cache, or else that a model on the hub has."""
    files = tuple(files)
    cached = (try_to_load_from_cache(name, file) for file in files)
    found = next((Path(file) for file in cached if isinstance(file, str)), None)
    downloaded = (_download(name, file) for file in files)
    return found or next((file for file in downloaded if file is not None), None)


def _download(name: str, file: str) -> Path | None:
    """A file of a model on the hub; None if the model has no such file."""
    try:
        return Path(hf_hub_download(name, file))
    except LocalEntryNotFoundError:
        raise PlanError(
            f"{name} is no folder, its {file} is not in the cache, and the hub does not answer; "
            "correct the name, or download the model first"
        ) from None
    except EntryNotFoundError:
        return None
    except Exception as error:  # no such model, no permission, a full disk
        raise _not_downloaded(name, error) from error


def _not_downloaded(name: str, error: Exception) -> PlanError:
    problem = f"{name} is no folder, and can't be downloaded from the hub: {shortened(error)}"
    return PlanError(f"{problem}; correct the name")
