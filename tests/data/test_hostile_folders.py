"""Data folders that are damaged, or made to harm: one sentence each, and nothing is started."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from PIL import EpsImagePlugin, Image

from growkernels.experiments.images import image_tree
from growkernels.experiments.images.folders import load_images, stored_size


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / split / name / "0.png")
    return tmp_path


def refused(folder: Path, words: str, square: int | None = None) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_images(folder, torch.Generator(), square=square)
    assert "\n" not in str(caught.value)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 16 16
%%EndComments
showpage
%%EOF
"""


def test_a_picture_that_is_a_program_starts_none(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: started.append(args))
    (tree / "train" / "a" / "0.png").write_bytes(EPS)
    refused(tree, r"0\.png cannot be read as an image")
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image"):
        stored_size(tree)
    assert not started


def test_a_png_is_png_and_a_jpg_may_be_png_as_in_imagenet(tree: Path) -> None:
    picture = tree / "train" / "a" / "0.jpg"
    Image.new("RGB", (16, 16)).save(picture, format="PNG")
    assert len(load_images(tree, torch.Generator()).train_labels) == 3
    Image.new("RGB", (16, 16)).save(picture, format="GIF")
    refused(tree, r"0\.jpg cannot be read as an image")
    picture.unlink()
    Image.new("RGB", (16, 16)).save(tree / "train" / "a" / "0.png", format="JPEG")
    refused(tree, r"0\.png cannot be read as an image")


def test_pipes_and_devices_are_no_images(tree: Path) -> None:
    picture = tree / "train" / "b" / "0.png"
    picture.unlink()
    os.mkfifo(picture)
    refused(tree, r"0\.png is no regular file")
    picture.unlink()
    picture.symlink_to("/dev/zero")
    refused(tree, r"0\.png is no regular file")
    picture.unlink()
    picture.mkdir()
    refused(tree, r"b holds no images|0\.png is no regular file")


@pytest.mark.parametrize("square", [None, 16])
def test_the_number_of_pixels_is_bounded(
    tree: Path, monkeypatch: pytest.MonkeyPatch, square: int | None
) -> None:
    assert image_tree.MAX_PIXELS < 13_000**2
    monkeypatch.setattr(image_tree, "MAX_PIXELS", 16 * 16)
    load_images(tree, torch.Generator())
    Image.new("RGB", (16, 17)).save(tree / "test" / "a" / "0.png")
    refused(tree, r"0\.png has 16x17 pixels", square)


def test_a_picture_that_claims_to_be_huge_is_not_decoded(tree: Path) -> None:
    header = struct.pack(">LLBBBBB", 100_000, 90_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        content += struct.pack(">L", len(data)) + kind + data
        content += struct.pack(">L", zlib.crc32(kind + data))
    (tree / "train" / "a" / "0.png").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for square in (None, 16):
        refused(tree, r"0\.png (has 100000x90000 pixels|cannot be read as an image)", square)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


@pytest.mark.parametrize("name", ["../../train/a/0.png", "/etc/passwd", "..", "", "a/../0.png"])
def test_annotations_name_files_beside_them(tree: Path, name: str) -> None:
    (tree / "test").rename(tree / "val")
    (tree / "val" / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tree / "val" / "images" / "0.png")
    lines = f"0.png\ta\t0\t0\t9\t9\n{name}\tb\t0\t0\t9\t9\n"
    (tree / "val" / "val_annotations.txt").write_text(lines)
    refused(tree, r"Line 2 of .*val_annotations\.txt .*names a file outside")


def cifar(folder: Path, labels: list[object]) -> Path:
    data = numpy.zeros((len(labels), 3072), numpy.uint8)
    content = pickle.dumps({b"data": data, b"labels": labels})
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(content)
    return folder


def test_labels_beyond_all_integers(tmp_path: Path) -> None:
    load_images(cifar(tmp_path, [0, 1, 9]), torch.Generator())
    for label in (10**30, -(10**30), 10):
        refused(cifar(tmp_path, [0, 1, label]), "has labels outside 0 ... 9")


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_a_huge_file_is_no_batch_and_is_not_read(tmp_path: Path, suffix: str) -> None:
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        with (tmp_path / f"{name}{suffix}").open("wb") as file:
            file.truncate(3073 << 30)  # sparse: it takes no room on the disk
    refused(tmp_path, "bytes, more than a batch of CIFAR-10 has")


def test_a_huge_annotations_file_is_not_read(tree: Path) -> None:
    (tree / "test").rename(tree / "val")
    with (tree / "val" / "val_annotations.txt").open("wb") as file:
        file.truncate(1 << 42)
    refused(tree, r"val_annotations\.txt .*unpack the archive again")
