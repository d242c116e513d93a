"""A folder that belongs to one run: locked, with the options it was started with, and files written whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

try:
    import fcntl
except ImportError:  # Windows has none: nothing keeps two runs out of one folder there
    fcntl = None  # type: ignore[assignment]


def save_atomically(content: Any, path: Path) -> None:
    """Writes a file whole or not at all: a run that is killed leaves the previous one.

    Args:
        content: what ``torch.save`` takes; of a ``.json`` file, what JSON can say.
        path: the file.

    Raises:
        OSError: it can't be written, a full disk for example.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.unlink(missing_ok=True)
        with unfinished.open("xb") as file:  # x: never through a link that somebody put there
            if path.suffix == ".json":
                file.write(json.dumps(content, indent=2).encode())
            else:
                torch.save(content, file)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{path} can't be written ({error}): is the disk full? What it held is kept") from error


def locked(folder: Path, *, wait: bool = False) -> BinaryIO:
    """The lock of a folder, which is free again when it is closed or the process ends, however it ends.

    Args:
        folder: an existing one.
        wait: for another process that has it.

    Raises:
        SystemExit: another process has it.
    """
    lock = (folder / ".lock").open("ab")
    if fcntl is not None:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            raise SystemExit(f"{folder} is in use by another run: choose another --output") from None
    return lock


def claim(folder: Path, settings: Mapping[str, Any], *, resume: bool) -> BinaryIO:
    """Takes a folder for one run, which must be the run that wrote what is already in it.

    Args:
        folder: made if it isn't there.
        settings: what decides the run's results, by the names of the options; kept in ``run.json``.
        resume: go on with what is in it.

    Returns:
        The lock.

    Raises:
        SystemExit: another process uses the folder, or what is in it must not be mixed with this run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder)
    record = folder / "run.json"
    settings = json.loads(json.dumps(settings))
    results = [path for path in (folder / "metrics.json", *folder.glob("*/checkpoint.pt")) if path.exists()]
    if not results:
        save_atomically(settings, record)
    elif not resume:
        raise SystemExit(
            f"{folder} holds the results of a run ({results[0].relative_to(folder)}): go on with it by "
            "--resume, or write to another folder by --output"
        )
    else:
        _compare(record, settings)
    return lock


def _compare(record: Path, settings: Mapping[str, Any]) -> None:
    """Ends the program if a run was started with other settings."""
    try:
        kept = json.loads(record.read_text())
        differing = [name for name, value in settings.items() if kept.get(name, value) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(
            f"{record}, which says how the run was started, can't be read ({error}): start anew in another "
            "--output"
        ) from None
    if differing:
        changes = [f"--{name.replace('_', '-')} {kept[name]}, now {settings[name]}" for name in differing]
        raise SystemExit(
            f"{record.parent} was started with other options: {'; '.join(changes)}. Go on with the same, or "
            "start anew in another --output"
        )


def fingerprint(path: Path | str | None) -> str | None:
    """What a file holds, in a few letters; the text itself where it names no file."""
    if path is None or not Path(path).is_file():
        return None if path is None else str(path)
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(2**20):  # COCO's annotations are too large to be held at once
            digest.update(chunk)
    return f"a file of contents {digest.hexdigest()[:12]}"
