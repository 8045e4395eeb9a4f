"""A run's folder: what a reproduction leaves on disk, and how it survives being killed.

Layout: ``config.json`` (what was asked for), ``metrics.jsonl`` (one record a line, in training
order), ``state/*.pt`` (checkpoints and finished parts), and at the end plots, ``report.html`` and
``summary.json``. Every file but the metrics is written to a temporary name and then renamed, so it
is either the old one or the new one, whole. Metrics are appended; a checkpoint remembers how long
that file was, and resuming cuts it back to there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import torch


def number(value: float) -> float | None:
    """JSON knows neither NaN nor inf."""
    return value if isfinite(value) else None


class RunFolderError(RuntimeError):
    """The folder cannot be used; the message is one sentence for the user."""


def write_atomically(target: Path, content: bytes) -> Path:
    """Replace ``target`` as a whole, or leave it as it is and raise RunFolderError."""
    temporary = target.with_name(f".{target.name}.new")

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
        write_atomically(self.path / f"{name}.pt", buffer.getvalue())

    def load(self, name: str) -> Any | None:
        """The state on the CPU, read with ``weights_only=True``, or None if there is none."""
        file = self.path / f"{name}.pt"
        if not file.exists():
            return None
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise RunFolderError(
                f"{file} cannot be read ({type(error).__name__}); delete it and use --resume "
                "again to compute that part anew."
            ) from error


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
        self._lock = self._acquire_lock()
        self.state = StateStore(path / "state")
        if not (path / "config.json").exists():
            self.write_json("config.json", self.config)
        self._metrics = path / "metrics.jsonl"
        self._pending: list[str] = []

    def _check(self, resume: bool) -> None:
        path, config_file = self.path, self.path / "config.json"
        if not refuse_occupied(path, resume):
            return
        try:
            stored = json.loads(config_file.read_text())
        except ValueError:
            raise RunFolderError(
                f"{config_file} is not valid JSON; delete {path} and start again without --resume."
            ) from None
        changed = sorted(
            k for k in stored.keys() | self.config.keys() if stored.get(k) != self.config.get(k)
        )
        if changed:
            raise RunFolderError(
                f"{path} was started with another configuration (different: {', '.join(changed)}); "
                "resume with the same options, or give --out another folder."
            )

    def _acquire_lock(self) -> io.TextIOWrapper:
        handle: io.TextIOWrapper = _attempt(
            "write", self.path, lambda: (self.path / ".lock").open("w")
        )
        try:
            # The kernel drops the lock when the process ends, however it ends.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise RunFolderError(
                f"{self.path} is in use by another process; wait for it or give --out another "
                "folder."
            ) from None
        return handle

    def close(self) -> None:
        """Write pending metrics and release the lock."""
        self._flush_metrics()
        self._lock.close()

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Replace the file ``name`` (a path inside the folder) as a whole."""
        return write_atomically(self.path / name, content)

    def write_json(self, name: str, value: Any) -> Path:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
        return self.write_bytes(name, text.encode())

    def read_json(self, name: str) -> Any | None:
        """The parsed file, or None if it is not there."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def log(self, **record: Any) -> None:
        """Add one record to the metrics; it reaches the disk with the next checkpoint."""
        self._pending.append(json.dumps(record, allow_nan=False))

    def _flush_metrics(self) -> None:
        if not self._pending:
            return
        text = "".join(line + "\n" for line in self._pending)

        def append() -> None:
            length = self._metrics.stat().st_size if self._metrics.exists() else 0
            try:
                with self._metrics.open("a") as file:
                    file.write(text)
            except OSError:
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    os.truncate(self._metrics, length)
                raise

        _attempt("write", self._metrics, append)
        self._pending = []

    def save_checkpoint(self, state: Any) -> None:
        """Store where the run is; :meth:`load_checkpoint` gives it back after any kind of end."""
        self._flush_metrics()
        length = self._metrics.stat().st_size if self._metrics.exists() else 0
        self.state.save("checkpoint", {"state": state, "metrics_bytes": length})

    def load_checkpoint(self) -> Any | None:
        """The last checkpoint's state or None; metrics written after it are dropped."""
        stored = self.state.load("checkpoint")
        length = 0 if stored is None else stored["metrics_bytes"]
        if self._metrics.exists() and self._metrics.stat().st_size > length:
            _attempt("write", self._metrics, lambda: os.truncate(self._metrics, length))
        return None if stored is None else stored["state"]


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
