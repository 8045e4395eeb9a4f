"""CIFAR-10's official archives, unpacked: pickled batches and binary batches.

Formats: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growkernels.saved_files import BoundedUnpickler

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
PIXELS = 3 * 32 * 32
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"
MAX_BYTES = 2**26  # of a batch, which has 31 MB in both formats


@dataclass(frozen=True)
class CifarBatches:
    """Where the batches lie and which of the two formats they have."""

    folder: Path
    binary: bool


@dataclass(frozen=True)
class CifarSplit:
    """One split: images [N, 3, 32, 32] uint8 and labels [N] int64."""

    images: Tensor
    labels: Tensor

    def read(self, indices: list[int], progress: Callable[[int, int], None]) -> Tensor:
        """The images with these indices."""
        progress(len(indices), len(indices))
        return self.images[torch.tensor(indices, device="cpu")]


def find_cifar_batches(folder: Path) -> CifarBatches | None:
    """The batches in a folder or in the archive's own folder inside it; None: there are none.

    Raises FileNotFoundError where some of the six files are missing, ValueError for CIFAR-100.
    """
    for place, binary in (
        (folder / "cifar-10-batches-py", False),
        (folder / "cifar-10-batches-bin", True),
        (folder, False),
        (folder, True),
    ):
        names = [n + ".bin" * binary for n in (*TRAIN_BATCHES, TEST_BATCH)]
        missing = [name for name in names if not (place / name).is_file()]
        if len(missing) == len(names):
            continue
        if missing:
            raise FileNotFoundError(
                f"{place} lacks {', '.join(missing)}; unpack CIFAR-10's archive there again."
            )
        return CifarBatches(place, binary)
    for place in (folder, folder / "cifar-100-python", folder / "cifar-100-binary"):
        if any((place / name).is_file() for name in ("fine_label_names.txt", "train.bin", "meta")):
            raise ValueError(
                f"{place} looks like CIFAR-100's archive; CIFAR-10's is needed, or a tree "
                "train/<class>/ and test/<class>/ of image files."
            )
    return None


def cifar_split(batches: CifarBatches, train: bool) -> CifarSplit:
    """Read the five training batches or the test batch.

    Raises ValueError for a file that is not a batch of CIFAR-10.
    """
    names = TRAIN_BATCHES if train else (TEST_BATCH,)
    read = _read_binary if batches.binary else _read_pickle
    parts = [read(batches.folder / (name + ".bin" * batches.binary)) for name in names]
    images = torch.cat([images for images, _ in parts]).view(-1, 3, 32, 32)
    return CifarSplit(images, torch.cat([labels for _, labels in parts]))


def _read_binary(path: Path) -> tuple[Tensor, Tensor]:
    content = _content(path)
    if not content or len(content) % (1 + PIXELS):
        raise ValueError(
            f"{path} has {len(content)} bytes, not a multiple of CIFAR-10's {1 + PIXELS} per "
            "image; unpack the archive again (CIFAR-100's has another format)."
        )
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 1 + PIXELS)
    return rows[:, 1:], _checked_labels(path, rows[:, 0].tolist())


def _read_pickle(path: Path) -> tuple[Tensor, Tensor]:
    import numpy

    content = _content(path)
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not a batch of CIFAR-10 ({error}).") from error
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(
            f"{path} is not a batch of CIFAR-10 or is damaged ({type(error).__name__}); unpack the "
            "archive again."
        ) from error
    data = batch.get(b"data") if isinstance(batch, dict) else None
    labels = batch.get(b"labels") if isinstance(batch, dict) else None
    if (
        not isinstance(data, numpy.ndarray)
        or data.dtype != numpy.uint8
        or data.ndim != 2
        or data.shape[1] != PIXELS
        or not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(type(label) is int for label in labels)
    ):
        raise ValueError(
            f"{path} is not a batch of CIFAR-10: it needs 'data' [images, {PIXELS}] of bytes and "
            "as many 'labels'; unpack the archive again."
        )
    images = torch.from_numpy(numpy.ascontiguousarray(data))
    return images, _checked_labels(path, labels)


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(
            f"{path} has {size} bytes, more than a batch of CIFAR-10 has; unpack the archive again."
        )
    return path.read_bytes()


def _checked_labels(path: Path, labels: list[int]) -> Tensor:
    # Before they become a tensor: Python's integers have no largest one.
    if not labels or min(labels) < 0 or max(labels) >= len(CIFAR10_CLASSES):
        raise ValueError(
            f"{path} has labels outside 0 ... {len(CIFAR10_CLASSES) - 1}, or none; it is not a "
            "batch of CIFAR-10."
        )
    return torch.tensor(labels, device="cpu")


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """What newer Pythons write into old-protocol pickles in place of bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


class _ArraysOnly(BoundedUnpickler):
    """Loads plain containers and numpy arrays; a pickle that names anything else is refused.

    A pickle may otherwise call any function of any module while it is loaded.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1_bytes
        arrays = {"numpy.core.multiarray", "numpy._core.multiarray"}
        if (module in arrays and name == "_reconstruct") or (
            module == "numpy" and name in ("ndarray", "dtype")
        ):
            # numpy 2 moved numpy.core.
            try:
                return getattr(importlib.import_module(module), name)
            except ModuleNotFoundError:
                other = "numpy._core" if module.startswith("numpy.core") else "numpy.core"
                return getattr(importlib.import_module(other + ".multiarray"), name)
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which is not allowed")
