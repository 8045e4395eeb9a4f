"""Labelled images from a folder, as tensors: image trees and the official CIFAR-10 archives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from growkernels.experiments.images.cifar_batches import (
    CIFAR10_CLASSES,
    cifar_split,
    find_cifar_batches,
)
from growkernels.experiments.images.image_tree import (
    SUFFIXES,
    ImageTree,
    Progress,
    find_image_tree,
    has_wordnet_names,
    image_size,
)

TINY_PIXELS = 64  # the size of Tiny ImageNet's images


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
    class_limit: int | None = None,
    square: int | None = None,
    progress: Progress | None = None,
) -> ImageData:
    """Read a data set, or a random part of it in which the classes are equally frequent.

    The folder holds one of

    * a tree of images, ``train/<class>/*.jpg`` and ``test/<class>/*.jpg`` (``.jpeg``, ``.png`` and
      ``val`` in place of ``test`` as well), all of one size or brought to one by ``square``; Tiny
      ImageNet's archive as it is, with ``val/val_annotations.txt``, too;
    * CIFAR-10's batches as unpacked from the official archives, for Python or binary: the files
      themselves or the folder ``cifar-10-batches-py`` or ``cifar-10-batches-bin`` around them.

    Only the images that are kept are decoded.

    Args:
        generator: a CPU generator, which decides what a limit keeps.
        train_limit: keep this many training images; None: all.
        test_limit: the same for test images.
        class_limit: keep the first so many classes, in alphabetical order, if there are more;
            None: all.
        square: resize the short side of every image in a tree to so many pixels (bicubic) and cut
            out the middle; None: the images have one size, which is kept.
        progress: called from time to time with (images read, images to read).

    Raises:
        FileNotFoundError: no such folder, or no data in it that is understood.
        ValueError: a split without images, classes that differ between the splits, a file that
            cannot be decoded, images of several sizes, a limit below the number of classes.
    """
    folder = Path(folder)
    classes, train, test = _open(folder, square)
    classes = classes[:class_limit]
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
    name = _name(classes, train, test, train_images.shape[-1])
    return ImageData(
        name, classes, train_images, train.labels[kept[0]], test_images, test.labels[kept[1]]
    )


def stored_size(folder: Path) -> tuple[int, int]:
    """Height and width of the first training image in ``folder``, from its header.

    Raises as ``load_images``.
    """
    _, train, _ = _open(Path(folder), None)
    return image_size(train.paths[0]) if isinstance(train, ImageTree) else (32, 32)


def _open(folder: Path, square: int | None) -> tuple[tuple[str, ...], _Split, _Split]:
    """Classes, training and test split of whatever the folder holds."""
    if folder.is_file():
        raise FileNotFoundError(
            f"{folder} is a file; unpack it (`tar xf {folder.name}`) and give the folder."
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; give the folder of the images.")
    batches = find_cifar_batches(folder)
    if batches is not None:
        if square not in (None, 32):
            raise ValueError(f"CIFAR-10's images have 32x32 pixels, not {square}x{square}.")
        return CIFAR10_CLASSES, cifar_split(batches, True), cifar_split(batches, False)
    tree = find_image_tree(folder, square)
    if tree is None:
        archive = next((p for p in sorted(folder.glob("*.tar*")) if p.is_file()), None)
        hint = f"; unpack {archive.name} there first" if archive else ""
        raise FileNotFoundError(
            f"{folder} holds neither train/<class>/*.jpg and test/<class>/*.jpg nor CIFAR-10's "
            f"batches{hint}."
        )
    return tree


def _name(classes: tuple[str, ...], train: _Split, test: _Split, size: int) -> str:
    """What the data is, for reports."""
    if not isinstance(train, ImageTree) or not isinstance(test, ImageTree):
        known = "CIFAR-10"
        return known if len(classes) == len(CIFAR10_CLASSES) else f"{known}, {len(classes)} classes"
    kinds = "/".join(sorted({SUFFIXES[p.suffix.lower()] for p in (*train.paths, *test.paths)}))
    if set(classes) == set(CIFAR10_CLASSES):
        return f"CIFAR-10 ({kinds})"
    if has_wordnet_names(classes):
        return f"{'Tiny-' * (size == TINY_PIXELS)}ImageNet-{len(classes)} ({kinds})"
    return f"{len(classes)} classes ({kinds})"


def _balanced_choice(
    labels: Tensor, classes: int, limit: int | None, generator: torch.Generator
) -> Tensor:
    """Indices of ``limit`` images of the first ``classes``, as equal in classes as can be.

    In ascending order.
    """
    candidates = (labels < classes).nonzero()[:, 0]
    if limit is None or limit >= len(candidates):
        return candidates
    if limit < classes:
        raise ValueError(f"A part of {limit} images cannot hold all {classes} classes; ask more.")
    order = candidates[torch.randperm(len(candidates), generator=generator, device="cpu")]
    rank_in_class = torch.empty_like(labels)
    for label in range(classes):
        members = order[labels[order] == label]
        rank_in_class[members] = torch.arange(len(members), device="cpu")
    best = torch.sort(rank_in_class[order], stable=True).indices[:limit]
    return order[best].sort().values
