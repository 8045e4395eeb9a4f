"""Labelled images from a folder, as tensors: image trees and the official CIFAR-10 archives."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from growkernels.data.cifar_batches import CIFAR10_CLASSES, cifar_split, find_cifar_batches

SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
Progress = Callable[[int, int], None]  # called with (images read, images to read)


@dataclass(frozen=True)
class ImageData:
    """Training and test images.

    Shapes: ``train_images`` [N, 3, H, W] uint8, ``train_labels`` [N] int64 (an index into
    ``classes``), the same for test. ``name`` says what the data is, for reports.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on a device."""
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return ImageData(self.name, self.classes, *(tensor.to(device) for tensor in tensors))


class _Split(Protocol):
    """Labels that are known at once, and images that are read when asked for."""

    @property
    def labels(self) -> Tensor: ...

    def read(self, indices: list[int], progress: Progress) -> Tensor: ...


def load_images(
    folder: Path,
    generator: torch.Generator,
    *,
    train_limit: int | None = None,
    test_limit: int | None = None,
    progress: Progress | None = None,
) -> ImageData:
    """Read a data set, or a random part of it in which the classes are equally frequent.

    The folder holds one of

    * a tree of images, ``train/<class>/*.jpg`` and ``test/<class>/*.jpg`` (``.jpeg``, ``.png`` and
      ``val`` in place of ``test`` as well), all of one size;
    * CIFAR-10's batches as unpacked from the official archives, for Python or binary: the files
      themselves or the folder ``cifar-10-batches-py`` or ``cifar-10-batches-bin`` around them.

    Only the images that are kept are decoded.

    Args:
        generator: a CPU generator, which decides what a limit keeps.
        train_limit: keep this many training images; None: all.
        test_limit: the same for test images.
        progress: called from time to time with (images read, images to read).

    Raises:
        FileNotFoundError: no such folder, or no data in it that is understood.
        ValueError: a split without images, classes that differ between the splits, a file that
            cannot be decoded, images of several sizes, a limit below the number of classes.
    """
    folder = Path(folder)
    if folder.is_file():
        raise FileNotFoundError(
            f"{folder} is a file; unpack it (`tar xf {folder.name}`) and give the folder."
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; give the folder of the images.")
    name, classes, train, test = _open(folder)
    kept = [
        _balanced_choice(split.labels, len(classes), limit, generator)
        for split, limit in ((train, train_limit), (test, test_limit))
    ]
    total = sum(len(indices) for indices in kept)
    report = progress or (lambda done, of: None)
    train_images = train.read(kept[0].tolist(), lambda done, _: report(done, total))
    test_images = test.read(kept[1].tolist(), lambda done, _: report(len(kept[0]) + done, total))
    if train_images.shape[1:] != test_images.shape[1:]:
        sizes = " and ".join(f"{i.shape[2]}x{i.shape[3]}" for i in (train_images, test_images))
        raise ValueError(
            f"Training and test images in {folder} differ in size ({sizes}); give both one size."
        )
    return ImageData(
        name, classes, train_images, train.labels[kept[0]], test_images, test.labels[kept[1]]
    )


def _open(folder: Path) -> tuple[str, tuple[str, ...], _Split, _Split]:
    """Name, classes, training and test split of whatever the folder holds."""
    batches = find_cifar_batches(folder)
    if batches is not None:
        return "CIFAR-10", CIFAR10_CLASSES, cifar_split(batches, True), cifar_split(batches, False)
    train_folder = folder / "train"
    test_folder = next((folder / n for n in ("test", "val") if (folder / n).is_dir()), None)
    if not train_folder.is_dir() and test_folder is None:
        archive = next((p for p in sorted(folder.glob("*.tar*")) if p.is_file()), None)
        hint = f"; unpack {archive.name} there first" if archive else ""
        raise FileNotFoundError(
            f"{folder} holds neither train/<class>/*.jpg and test/<class>/*.jpg nor CIFAR-10's "
            f"batches{hint}."
        )
    for split, found in (("train", train_folder.is_dir()), ("test", test_folder is not None)):
        if not found:
            raise FileNotFoundError(
                f"{folder} has no folder {split!r}; a data set needs train/<class>/ and "
                "test/<class>/ (or val/<class>/)."
            )
    assert test_folder is not None
    classes = _class_names(train_folder)
    unknown = sorted(set(_class_names(test_folder)) ^ set(classes))
    if unknown:
        raise ValueError(
            f"{train_folder} and {test_folder} differ in their classes ({', '.join(unknown[:5])}); "
            "give both the same class folders."
        )
    train, test = ImageTree(train_folder, classes), ImageTree(test_folder, classes)
    kinds = "/".join(sorted({SUFFIXES[p.suffix.lower()] for p in (*train.paths, *test.paths)}))
    known = "CIFAR-10" if set(classes) == set(CIFAR10_CLASSES) else f"{len(classes)} classes"
    return f"{known} ({kinds})", classes, train, test


def _class_names(split_folder: Path) -> tuple[str, ...]:
    names = sorted(
        entry.name
        for entry in os.scandir(split_folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise ValueError(
            f"{split_folder} has no class folders; put the images into {split_folder}/<class>/."
        )
    return tuple(names)


class ImageTree:
    """One split of an image tree: a folder with one folder per class.

    Raises ValueError for a class without images.
    """

    def __init__(self, split_folder: Path, classes: tuple[str, ...]) -> None:
        self.paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            files = sorted(
                path for path in (split_folder / name).rglob("*") if path.suffix.lower() in SUFFIXES
            )
            if not files:
                raise ValueError(
                    f"{split_folder / name} holds no images ({', '.join(SUFFIXES)}); add some or "
                    "remove the folder from both splits."
                )
            self.paths += files
            labels += [label] * len(files)
        self.labels = torch.tensor(labels)

    def read(self, indices: list[int], progress: Progress) -> Tensor:
        """The images [len(indices), 3, H, W] uint8, decoded in parallel."""
        first = _decode(self.paths[indices[0]])
        images = first.new_empty(len(indices), *first.shape)

        def fill(place: int) -> None:
            path = self.paths[indices[place]]
            image = _decode(path)
            if image.shape != first.shape:
                raise ValueError(
                    f"{path} is {image.shape[1]}x{image.shape[2]} pixels, "
                    f"{self.paths[indices[0]]} is {first.shape[1]}x{first.shape[2]}; "
                    "give all images one size."
                )
            images[place] = image

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            try:
                for done, _ in enumerate(pool.map(fill, range(len(indices))), start=1):
                    if done % 100 == 0 or done == len(indices):
                        progress(done, len(indices))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return images


def _decode(path: Path) -> Tensor:
    """One image file as [3, H, W] uint8; grey and palette images become RGB."""
    import numpy
    from PIL import Image

    try:
        with Image.open(path) as file:
            pixels = numpy.array(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error) if str(path) not in str(error) else "not an image"
        raise ValueError(
            f"{path} cannot be read as an image ({reason}); replace or delete it."
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _balanced_choice(
    labels: Tensor, classes: int, limit: int | None, generator: torch.Generator
) -> Tensor:
    """Indices of ``limit`` images, as equal in classes as can be, in ascending order."""
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    if limit < classes:
        raise ValueError(f"A part of {limit} images cannot hold all {classes} classes; ask more.")
    order = torch.randperm(len(labels), generator=generator)
    rank_in_class = torch.empty_like(order)
    for label in range(classes):
        members = order[labels[order] == label]
        rank_in_class[members] = torch.arange(len(members))
    best = torch.sort(rank_in_class[order], stable=True).indices[:limit]
    return order[best].sort().values
