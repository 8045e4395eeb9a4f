"""A run's folder: what a reproduction leaves on disk, and how it survives being killed.

Layout: ``config.json`` (what was asked for), ``metrics.jsonl`` (one record a line, of the trainings
that are finished), ``state/*.pt`` (checkpoints and finished parts), and at the end plots,
``report.html`` and ``summary.json``. Every file is written to a temporary name and then renamed, so
it is either the old one or the new one, whole.
"""

from __future__ import annotations

import errno
import io
import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn, TypeVar

import torch
from filelock import FileLock, Timeout

from growkernels.saved_files import read_saved

T = TypeVar("T")
# What reading a state raises that is none of the kind that was expected.
FOREIGN = (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError)
MAX_JSON = 2**28  # bytes: larger files are none of ours, and are not read


def number(value: float) -> float | None:
    """JSON knows neither NaN nor inf."""
    return value if isfinite(value) else None


class RunFolderError(RuntimeError):
    """The folder cannot be used; the message is one sentence for the user."""


UNFINISHED = ".*.new-*"


def write_atomically(target: Path, content: bytes) -> Path:
    """Replace ``target`` as a whole, or leave it as it is and raise RunFolderError.

    Each writer has a temporary file of its own: the workers of a run that was killed may still be
    writing when the run goes on.
    """
    temporary = target.with_name(f".{target.name}.new-{uuid.uuid4().hex}")

    def write() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)  # there only if something failed

    _attempt("write", target, write)
    return target


@dataclass(frozen=True)
class StateStore:
    """Named states (tensors, numbers, strings and containers of them) as files of one folder."""

    path: Path

    def save(self, name: str, state: Any) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.file(name), buffer.getvalue())

    def file(self, name: str) -> Path:
        return self.path / f"{name}.pt"

    def load(self, name: str) -> Any | None:
        """The state on the CPU, or None if there is none; no code in it is run."""
        file = self.file(name)
        if not file.exists():
            return None
        try:
            return read_saved(file)
        except (UnpicklingError, OSError) as error:
            raise RunFolderError(
                f"{file} cannot be read ({error}); delete it and use --resume again to compute "
                "that part anew."
            ) from error

    def computed(self, name: str, compute: Callable[[], Any], read: Callable[[Any], T]) -> T:
        """``read`` of a state, which is computed and saved first where it is not there."""
        found = self.load(name)
        if found is None:
            found = compute()
            self.save(name, found)
        try:
            return read(found)
        except FOREIGN as error:
            raise self.foreign(name, error) from error

    def foreign(self, name: str, error: Exception) -> RunFolderError:
        """What to raise where a state loads but is not what it should be."""
        return RunFolderError(
            f"{self.file(name)} does not hold the state of this part ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}); delete it and use --resume again to compute "
            "that part anew."
        )


def refuse_occupied(path: Path, resume: bool) -> bool:
    """Whether ``path`` holds a run to resume; what can be told before the run's config is known.

    Raises RunFolderError for a file, for a folder that is neither a run's nor empty, and without
    ``resume`` for one that holds a run.
    """
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file; give --out a folder.")
    try:
        leftovers = {"state", ".lock"}
        occupied = path.exists() and any(p.name not in leftovers for p in path.iterdir())
    except PermissionError:
        raise RunFolderError(f"{path} cannot be read; give --out another folder.") from None
    if not occupied:
        return False
    if not resume:
        raise RunFolderError(
            f"{path} already holds files; add --resume to continue the run in it, or give "
            "--out another folder."
        )
    if not (path / "config.json").exists():
        raise RunFolderError(
            f"{path} is not the folder of a run (no config.json); give --out another folder."
        )
    return True


class RunFolder:
    """The folder of one run, locked against a second process as long as this object lives.

    ``config`` is what defines the run, as plain JSON values. A new run needs a folder that is not
    there or empty; with ``resume`` a folder with the same config is continued (and one that is not
    there yet is started). Raises RunFolderError for a folder that exists, belongs to another
    config, is in use, or cannot be written.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], resume: bool = False) -> None:
        self.path = path
        self.config = json.loads(json.dumps(config))
        self._check(resume)
        _attempt("create", path, lambda: path.mkdir(parents=True, exist_ok=True))
        self._lock = FileLock(path / ".lock", blocking=False)
        try:
            # The kernel drops the lock when the process ends, however it ends.
            self._lock.acquire()
        except Timeout:
            raise RunFolderError(
                f"{path} is in use by another process; wait for it or give --out another folder."
            ) from None
        except OSError as error:
            _refuse("write", path, error)
        self.state = StateStore(path / "state")
        # What killed writers left; one that still writes fails, and cannot replace what follows.
        for leftover in path.rglob(UNFINISHED):
            leftover.unlink(missing_ok=True)
        if not (path / "config.json").exists():
            self.write_json("config.json", self.config)

    def _check(self, resume: bool) -> None:
        path, config_file = self.path, self.path / "config.json"
        if not refuse_occupied(path, resume):
            return
        stored = self.read_json("config.json")
        if not isinstance(stored, dict):
            raise RunFolderError(
                f"{config_file} is not the configuration of a run; delete {path} and start again "
                "without --resume."
            )
        changed = sorted(
            k for k in stored.keys() | self.config.keys() if stored.get(k) != self.config.get(k)
        )
        if changed:
            raise RunFolderError(
                f"{path} was started with another configuration (different: {', '.join(changed)}); "
                "resume with the same options, or give --out another folder."
            )

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Replace the file ``name`` (a path inside the folder) as a whole."""
        return write_atomically(self.path / name, content)

    def write_json(self, name: str, value: Any) -> Path:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
        return self.write_bytes(name, text.encode())

    def write_metrics(self, records: Iterable[Mapping[str, Any]]) -> Path:
        """Replace metrics.jsonl by these records."""
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        return self.write_bytes("metrics.jsonl", text.encode())

    def read_json(self, name: str) -> Any | None:
        """The parsed file, or None if it is not there."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            if path.stat().st_size > MAX_JSON:
                raise ValueError
            return json.loads(path.read_text())
        except (OSError, ValueError):
            raise RunFolderError(
                f"{path} cannot be read as JSON; delete {self.path} and start again without "
                "--resume."
            ) from None


def _attempt(verb: str, target: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except OSError as error:
        _refuse(verb, target, error)


def _refuse(verb: str, target: Path, error: OSError) -> NoReturn:
    if error.errno == errno.ENOSPC:
        message = (
            f"The disk is full, {target} was not written; free some space and continue with "
            "--resume, nothing up to the last checkpoint is lost."
        )
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        message = f"No permission to {verb} {target}; give --out a folder you can write to."
    else:
        message = f"Could not {verb} {target} ({error.strerror}); give --out another folder."
    raise RunFolderError(message) from error
