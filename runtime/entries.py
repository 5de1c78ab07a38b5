"""Folders on disk that are there whole or not at all, whoever else writes or reads beside us.

An entry is made under another name, locked while it is in use, and renamed when it is whole.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".unfinished"


@contextlib.contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A folder beside the entry's, locked while it is in use, and gone in the end unless it was renamed."""
    work, lock = _locked_beside(folder)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _locked_beside(folder):
    """A new folder beside the entry's, and its lock. A sweep between the two takes it away: then another is made."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=UNFINISHED, dir=folder.parent))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(work, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if work.exists():
                return work, lock
            os.close(lock)


def rename(work: Path, folder: Path) -> None:
    """Makes what is in the workspace the entry.

    Raises:
        FileExistsError: another process was quicker.
    """
    try:
        os.rename(work, folder)
    except OSError as error:
        if folder.exists():
            raise FileExistsError(str(folder)) from error
        raise


def discard(folder: Path) -> None:
    """Takes an entry away; whoever reads it at this moment finds files missing, and makes its own."""
    with contextlib.suppress(OSError):
        away = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=UNFINISHED, dir=folder.parent))
        try:
            os.rename(folder, away)
        finally:
            shutil.rmtree(away, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Removes what processes left that were stopped while they wrote."""
    for work in parent.glob(f"*{UNFINISHED}"):
        with contextlib.suppress(OSError):
            lock = os.open(work, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(work, ignore_errors=True)
            finally:
                os.close(lock)
