"""Verification of checkpoints: `verify_checkpoint`, and the command ``smile-verify FOLDER …``."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ..exceptions import SmileError
from .digests import check_digests
from .metadata import SmileMetadata
from .transformers_hook import read_section


def verify_checkpoint(path: str | os.PathLike[str]) -> int:
    """Compare all tensors of a checkpoint with the digests that were saved with them; their number is returned.

    Raises CheckpointError, which names the first damaged tensor, also for a checkpoint without digests.
    """
    folder = Path(path)
    section, _ = read_section(folder)
    SmileMetadata.from_dict(section, str(folder))
    return check_digests(folder, section)


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify the folders that the command line names, one line for each.

    Raises SystemExit with 1 if one of them is damaged.
    """
    parser = argparse.ArgumentParser(description="Compare the tensors of SMILE checkpoints with their saved digests.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of a checkpoint")
    damaged = False
    for folder in parser.parse_args(arguments).folders:
        try:
            print(f"{folder}: all {verify_checkpoint(folder)} tensors are as they were saved")
        except SmileError as error:
            print(f"error: {error}")
            damaged = True
    if damaged:
        raise SystemExit(1)
