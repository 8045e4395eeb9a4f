"""A run's images, decoded once: later runs of the same command and all workers read this file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from growkernels.data.images import ImageData
from growkernels.experiments.run_folder import RunFolderError


def store_images(path: Path, source: Mapping[str, Any], make: Callable[[], ImageData]) -> None:
    """Make sure that ``path`` holds the images that ``source`` (plain values) describes.

    They are made and written, to a temporary name that is then renamed, unless a file made for an
    equal source is there.
    """
    if path.exists() and _read(path)["source"] == dict(source):
        return
    data = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save({"source": dict(source), "data": vars(data)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save's own error, about positions in the file, hides the system's.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise RunFolderError(
            f"The decoded images could not be written to {path} ({reason.strerror}); free some "
            "space there or give --out another folder."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)  # there only if something failed


def stored_images(path: Path) -> ImageData:
    """The images in the file, mapped into memory: only what is used is read."""
    data = _read(path)["data"]
    return ImageData(**{**data, "classes": tuple(data["classes"])})


def _read(path: Path) -> Any:
    try:
        return torch.load(path, mmap=True, weights_only=True)
    except Exception as error:
        raise RunFolderError(
            f"{path} cannot be read ({type(error).__name__}); delete it and use --resume again to "
            "decode the images anew."
        ) from error
