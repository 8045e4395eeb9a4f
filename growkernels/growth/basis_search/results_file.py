"""Results of finished trainings, one line each in a file that survives being killed."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
from pathlib import Path

Key = tuple[str | None, int, int]  # module path (None: the model as it is), R, seed


class ResultsFile:
    """A JSON Lines file: first what the results belong to, then a line for every result.

    A line counts when it is whole, so a kill loses at most the line being written. The file is
    locked against a second process until ``close``. With ``path`` None nothing is stored.

    Raises:
        ValueError: a file of another search, one that is none, or one in use.
    """

    def __init__(self, path: Path | None, identity: list[object]) -> None:
        self.results: dict[Key, tuple[float, float]] = {}
        self._file: io.FileIO | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = io.FileIO(path, "a+")
        try:
            self._lock(path)
            self._read(path, json.loads(json.dumps(identity)))
        except BaseException:
            self.close()
            raise

    def add(self, key: Key, quality: float, seconds: float) -> None:
        """Store one result; it is on the disk afterwards."""
        self.results[key] = (quality, seconds)
        finite = quality if math.isfinite(quality) else None
        self._append([*key, finite, seconds])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _append(self, value: object) -> None:
        if self._file is None:
            return
        line = memoryview(json.dumps(value).encode() + b"\n")
        while line:
            line = line[self._file.write(line) :]
        os.fsync(self._file.fileno())

    def _lock(self, path: Path) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except OSError:
            raise ValueError(
                f"{path} is in use by another search; wait for it, or give another file."
            ) from None

    def _read(self, path: Path, identity: list[object]) -> None:
        assert self._file is not None
        self._file.seek(0)
        content = self._file.readall()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if content and not lines and not content.startswith(b"["):
            raise ValueError(f"{path} is not a file of search results; give another file.")
        self._file.truncate(len(whole))
        if not lines:
            self._append(identity)
            return
        try:
            stored, *results = [json.loads(line) for line in lines]
            for layer, rank, seed, quality, seconds in results:
                self.results[layer, rank, seed] = (
                    math.nan if quality is None else quality,
                    seconds,
                )
        except (ValueError, TypeError):
            raise ValueError(
                f"{path} is not a file of search results, or damaged; give another file, or "
                "delete it to start anew."
            ) from None
        if stored != identity:
            raise ValueError(
                f"{path} holds results of another model or other initial weights; give another "
                "file, or delete it to start anew."
            )
