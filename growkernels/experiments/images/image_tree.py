"""Trees of image files, one folder per class: where the files are, and decoding them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image as PillowImage

SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
# What a file may hold by its name. Nothing else is tried: some of Pillow's formats start programs.
# One of ImageNet's files is a PNG named .JPEG; a lossy file is never called PNG.
FORMATS = {"JPEG": ("JPEG", "PNG"), "PNG": ("PNG",)}
MAX_PIXELS = 2**26  # 8192 x 8192: decoded in one piece, of which as many as there are cores
MAX_ANNOTATIONS = 2**28  # bytes; Tiny ImageNet's has 400 kB
ANNOTATIONS = "val_annotations.txt"  # in Tiny ImageNet's val: file name, tab, class, and a box
_WORDNET_ID = re.compile(r"n\d{8}")

Progress = Callable[[int, int], None]  # called with (images read, images to read)


@dataclass(frozen=True)
class ImageTree:
    """One split of a tree: files [N], labels [N] int64, and the size they are brought to.

    With ``square`` the short side of every image is resized to it and the middle is cut out; None:
    the files have one size, which is kept.
    """

    paths: list[Path]
    labels: Tensor
    square: int | None

    def read(self, indices: list[int], progress: Progress) -> Tensor:
        """The images [len(indices), 3, H, W] uint8, decoded in parallel.

        Raises ValueError for a file that is no image, or images of several sizes.
        """
        first = decode(self.paths[indices[0]], self.square)
        images = first.new_empty(len(indices), *first.shape)

        def fill(place: int) -> None:
            path = self.paths[indices[place]]
            image = decode(path, self.square)
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


def find_image_tree(
    folder: Path, square: int | None
) -> tuple[tuple[str, ...], ImageTree, ImageTree] | None:
    """Class names, training and test split of the tree in ``folder``; None: there is no tree.

    Test images lie in ``test/<class>/`` or ``val/<class>/``, or, as in Tiny ImageNet's archive, in
    ``val/images/`` with their classes in ``val/val_annotations.txt``.

    Raises FileNotFoundError where one of the splits is missing, ValueError for a split or a class
    without images, and for splits that differ in their classes.
    """
    annotations = folder / "val" / ANNOTATIONS
    train_folder = folder / "train"
    test_folder = next((folder / n for n in ("test", "val") if (folder / n).is_dir()), None)
    if not train_folder.is_dir() and test_folder is None:
        return None
    for split, found in (("train", train_folder.is_dir()), ("test", test_folder is not None)):
        if not found:
            raise FileNotFoundError(
                f"{folder} has no folder {split!r}; a data set needs train/<class>/ and "
                "test/<class>/ (or val/<class>/)."
            )
    assert test_folder is not None
    classes = _class_names(train_folder)
    if annotations.is_file():
        test = _annotated(annotations, classes, square)
        return classes, _tree(train_folder, classes, square), test
    unknown = sorted(set(_class_names(test_folder)) ^ set(classes))
    if unknown:
        raise ValueError(
            f"{train_folder} and {test_folder} differ in their classes ({', '.join(unknown[:5])}); "
            "give both the same class folders."
        )
    return classes, _tree(train_folder, classes, square), _tree(test_folder, classes, square)


def has_wordnet_names(classes: tuple[str, ...]) -> bool:
    """Whether the classes are named as ImageNet's are, n01440764 and so on."""
    return all(_WORDNET_ID.fullmatch(name) for name in classes)


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


def _tree(split_folder: Path, classes: tuple[str, ...], square: int | None) -> ImageTree:
    paths: list[Path] = []
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
        paths += files
        labels += [label] * len(files)
    return ImageTree(paths, torch.tensor(labels, device="cpu"), square)


def _annotated(annotations: Path, classes: tuple[str, ...], square: int | None) -> ImageTree:
    label_of = {name: label for label, name in enumerate(classes)}
    files: list[tuple[int, Path]] = []
    if annotations.stat().st_size > MAX_ANNOTATIONS:
        raise ValueError(
            f"{annotations} is too large for a list of images; unpack the archive again."
        )
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        name, _, rest = line.partition("\t")
        label = label_of.get(rest.partition("\t")[0])
        if label is None:
            raise ValueError(
                f"Line {number} of {annotations} names no class of the training images; unpack the "
                "archive again."
            )
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(
                f"Line {number} of {annotations} names a file outside {annotations.parent}/images "
                f"({name!r}); unpack the archive again."
            )
        files.append((label, annotations.parent / "images" / name))
    missing = sorted(set(classes) - {classes[label] for label, _ in files})
    if missing:
        raise ValueError(
            f"{annotations} lists no images of {', '.join(missing[:5])}; unpack the archive again."
        )
    files.sort()
    return ImageTree(
        [path for _, path in files], torch.tensor([la for la, _ in files], device="cpu"), square
    )


def decode(path: Path, square: int | None = None) -> Tensor:
    """One image file as [3, H, W] uint8; grey and palette images become RGB.

    With ``square``: [3, square, square], bicubic with the short side resized to it, the middle cut
    out. Raises ValueError for a file that is no image of the format in its name, is damaged, or
    has more than ``MAX_PIXELS``.
    """
    import numpy
    from PIL import Image, ImageOps

    with _opened(path) as file:
        image = file.convert("RGB")
        if square is not None:
            image = ImageOps.fit(image, (square, square), Image.Resampling.BICUBIC)
        pixels = numpy.array(image)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, from its header. Raises as ``decode``."""
    with _opened(path) as file:
        return file.height, file.width


@contextmanager
def _opened(path: Path) -> Iterator[PillowImage.Image]:
    """The image, not decoded yet; what goes wrong in opening and in decoding is a ValueError."""
    from PIL import Image

    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{path} is no regular file; replace or delete it.")
    try:
        with Image.open(path, formats=FORMATS[SUFFIXES[path.suffix.lower()]]) as file:
            if file.width * file.height <= MAX_PIXELS:
                yield file
                return
            size = f"{file.width}x{file.height}"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error) if str(path) not in str(error) else "not an image"
        raise ValueError(
            f"{path} cannot be read as an image ({reason}); replace or delete it."
        ) from error
    raise ValueError(
        f"{path} has {size} pixels, more than {MAX_PIXELS:,}; make it smaller or delete it."
    )
