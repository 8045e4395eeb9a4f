"""Image folders and CIFAR-10's archives become the same tensors, and bad ones are refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from growkernels.experiments.images.augment import Normalise, random_crop_flip
from growkernels.experiments.images.folders import ImageData, load_images, stored_size

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def pixels(count: int, size: int = 8, seed: int = 0) -> numpy.ndarray:
    """[count, size, size, 3] of bytes."""
    return numpy.random.default_rng(seed).integers(0, 256, (count, size, size, 3), numpy.uint8)


def write_tree(
    root: Path,
    classes: list[str],
    train: int = 3,
    test: int = 2,
    suffix: str = ".png",
    test_name: str = "test",
) -> None:
    """A tree of random images; image i of a class has seed i."""
    for split, count in (("train", train), (test_name, test)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i, image in enumerate(pixels(count, seed=label)):
                Image.fromarray(image).save(folder / f"{i:04}{suffix}")


def load(folder: Path, **options: int) -> ImageData:
    return load_images(folder, torch.Generator().manual_seed(0), **options)


def test_a_tree_becomes_the_pixels_of_its_files(tmp_path: Path) -> None:
    write_tree(tmp_path, ["zebra", "ant"])
    data = load(tmp_path)
    assert data.classes == ("ant", "zebra")
    assert data.train_images.shape == (6, 3, 8, 8)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    zebra = torch.from_numpy(pixels(3, seed=0)).permute(0, 3, 1, 2)
    assert torch.equal(data.train_images[3:], zebra)
    assert data.name == "2 classes (PNG)"


@pytest.mark.parametrize(("suffix", "kind"), [(".jpg", "JPEG"), (".JPEG", "JPEG"), (".png", "PNG")])
def test_the_name_says_what_the_files_are(tmp_path: Path, suffix: str, kind: str) -> None:
    write_tree(tmp_path, CIFAR10, 1, 1, suffix=suffix, test_name="val")
    assert load(tmp_path).name == f"CIFAR-10 ({kind})"


def test_tiny_imagenets_archive_and_the_first_of_its_classes(tmp_path: Path) -> None:
    wnids = ["n01443537", "n01629819", "n01641577"]
    write_tree(tmp_path, wnids, test_name="unlabelled")
    (tmp_path / "test" / "images").mkdir(parents=True)
    (tmp_path / "val" / "images").mkdir(parents=True)
    lines = []
    for i, image in enumerate(pixels(6, seed=9)):
        Image.fromarray(image).save(tmp_path / "val" / "images" / f"val_{i}.png")
        lines.append(f"val_{i}.png\t{wnids[i % 3]}\t0\t0\t7\t7\n")
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("".join(lines))
    data = load(tmp_path, class_limit=2)
    assert data.name == "ImageNet-2 (PNG)"
    assert data.classes == tuple(wnids[:2])
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    expected = torch.from_numpy(pixels(6, seed=9)[[0, 3, 1, 4]]).permute(0, 3, 1, 2)
    assert torch.equal(data.test_images, expected)
    assert load(tmp_path, class_limit=4).classes == tuple(wnids)
    annotations.write_text(lines[0] + "val_1.png\tn99\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*val_annotations\.txt names no class"):
        load(tmp_path)
    annotations.write_text(lines[0])
    with pytest.raises(ValueError, match="lists no images of n01629819, n01641577"):
        load(tmp_path)


def test_images_of_64_pixels_with_wordnet_classes_are_tiny_imagenet(tmp_path: Path) -> None:
    write_tree(tmp_path, ["n01443537"], 1, 1)
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(pixels(1, size=64)[0]).save(path)
    assert load(tmp_path).name == "Tiny-ImageNet-1 (PNG)"


def test_images_of_any_size_become_squares_of_one(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a"], 2, 1)
    wide = numpy.zeros((20, 40, 3), numpy.uint8)
    wide[:, 10:30] = 200  # the middle square
    Image.fromarray(wide).save(tmp_path / "train" / "a" / "0000.png")
    assert stored_size(tmp_path) == (20, 40)
    images = load(tmp_path, square=10).train_images
    assert images.shape == (2, 3, 10, 10)
    assert (images[0][:, :, 2:-2] == 200).all()
    write_cifar(tmp_path / "c", binary=True)
    assert stored_size(tmp_path / "c") == (32, 32)
    with pytest.raises(ValueError, match="have 32x32 pixels, not 64x64"):
        load(tmp_path / "c", square=64)


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a"], 1, 1)
    Image.fromarray(pixels(1)[0, :, :, 0]).save(tmp_path / "train" / "a" / "0000.png")
    grey = load(tmp_path).train_images[0]
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], torch.from_numpy(pixels(1)[0, :, :, 0]))


def test_a_part_is_balanced_repeatable_and_of_the_generators_choice(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a", "b"], train=12)
    whole, part = load(tmp_path), load(tmp_path, train_limit=7)
    assert sorted(part.train_labels.bincount().tolist()) == [3, 4]
    assert torch.equal(part.train_images, load(tmp_path, train_limit=7).train_images)
    other = load_images(tmp_path, torch.Generator().manual_seed(1), train_limit=7)
    assert not torch.equal(part.train_images, other.train_images)
    for image, label in zip(part.train_images, part.train_labels, strict=True):
        place = (whole.train_images == image).flatten(1).all(1).nonzero()[:, 0]
        assert whole.train_labels[place].tolist() == [int(label)]
    assert len(part.test_images) == len(whole.test_images)


def test_only_what_is_kept_is_decoded(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a", "b"], train=20)
    seen: list[tuple[int, int]] = []
    load_images(
        tmp_path, torch.Generator(), train_limit=4, progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (8, 8)


def write_cifar(root: Path, binary: bool, images: int = 4, protocol: int = 2) -> numpy.ndarray:
    """The six batches; returns all training pixels [5 * images, 3072]."""
    root.mkdir(parents=True)
    everything = []
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        rows = numpy.random.default_rng(number).integers(0, 256, (images, 3072), numpy.uint8)
        labels = [(number + i) % 10 for i in range(images)]
        everything.append(rows)
        if binary:
            column = numpy.array(labels, numpy.uint8)[:, None]
            (root / f"{name}.bin").write_bytes(numpy.hstack((column, rows)).tobytes())
        else:
            batch = {b"batch_label": b"x", b"labels": labels, b"data": rows, b"filenames": []}
            (root / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return numpy.concatenate(everything[:5])


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("binary", [True, False])
def test_cifars_archives(tmp_path: Path, binary: bool, inside: bool) -> None:
    name = "cifar-10-batches-bin" if binary else "cifar-10-batches-py"
    rows = write_cifar(tmp_path / name, binary)
    data = load(tmp_path if inside else tmp_path / name)
    assert data.name == "CIFAR-10"
    assert list(data.classes) == CIFAR10
    assert torch.equal(data.train_images, torch.from_numpy(rows).view(-1, 3, 32, 32))
    assert data.train_labels[:6].tolist() == [0, 1, 2, 3, 1, 2]
    assert data.test_labels.tolist() == [5, 6, 7, 8]
    assert len(load(tmp_path / name, train_limit=10).train_images) == 10


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    write_cifar(tmp_path / "c", binary=False)
    trace = tmp_path / "was-here"
    (tmp_path / "c" / "data_batch_3").write_bytes(pickle.dumps(Evil(trace), protocol=2))
    with pytest.raises(ValueError, match=r"data_batch_3 is not a batch of CIFAR-10.*not allowed"):
        load(tmp_path / "c")
    assert not trace.exists()


def spoil_labels(path: Path) -> None:
    batch = {b"labels": [0, 11], b"data": numpy.zeros((2, 3072), numpy.uint8)}
    path.write_bytes(pickle.dumps(batch, protocol=2))


def spoil_shape(path: Path) -> None:
    batch = {b"labels": [0, 1], b"data": numpy.zeros((2, 3073), numpy.uint8)}
    path.write_bytes(pickle.dumps(batch, protocol=2))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("spoil", [spoil_labels, spoil_shape, cut_short])
def test_a_damaged_batch_is_refused(tmp_path: Path, spoil: object) -> None:
    write_cifar(tmp_path / "c", binary=False)
    spoil(tmp_path / "c" / "data_batch_2")
    with pytest.raises(ValueError, match=r"data_batch_2 .*CIFAR-10"):
        load(tmp_path / "c")


def test_a_binary_batch_of_another_size_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path / "c", binary=True)
    (tmp_path / "c" / "data_batch_2.bin").write_bytes(bytes(3074))
    with pytest.raises(ValueError, match="3074 bytes, not a multiple of CIFAR-10's 3073"):
        load(tmp_path / "c")


def test_folders_that_hold_no_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="holds neither train/<class>"):
        load(tmp_path)
    archive = tmp_path / "cifar.tar.gz"
    archive.touch()
    with pytest.raises(FileNotFoundError, match=r"unpack cifar\.tar\.gz there first"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is a file; unpack it"):
        load(archive)


def test_archives_that_are_not_whole_or_not_cifar_10(tmp_path: Path) -> None:
    write_cifar(tmp_path / "c", binary=True)
    (tmp_path / "c" / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_4\.bin"):
        load(tmp_path / "c")
    (tmp_path / "d" / "cifar-100-python").mkdir(parents=True)
    (tmp_path / "d" / "cifar-100-python" / "meta").touch()
    with pytest.raises(ValueError, match="looks like CIFAR-100"):
        load(tmp_path / "d")


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_missing_split(tmp_path: Path, missing: str) -> None:
    kept = "test" if missing == "train" else "train"
    (tmp_path / kept / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"has no folder '{missing}'"):
        load(tmp_path)


def test_splits_without_images(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="has no class folders"):
        load(tmp_path)
    (tmp_path / "train" / "a").mkdir()
    (tmp_path / "test" / "b").mkdir()
    with pytest.raises(ValueError, match=r"differ in their classes \(a, b\)"):
        load(tmp_path)
    (tmp_path / "train" / "b").mkdir()
    (tmp_path / "test" / "a").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        load(tmp_path)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a"])
    whole = (tmp_path / "train" / "a" / "0001.png").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "train" / "a" / "0001.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"0001\.png cannot be read as an image"):
            load(tmp_path)


def test_images_of_several_sizes(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a"])
    Image.fromarray(pixels(1, size=9)[0]).save(tmp_path / "train" / "a" / "0002.png")
    with pytest.raises(ValueError, match=r"0002\.png is 9x9 pixels"):
        load(tmp_path)
    for path in (tmp_path / "train" / "a").iterdir():
        Image.fromarray(pixels(1, size=9)[0]).save(path)
    with pytest.raises(ValueError, match="differ in size"):
        load(tmp_path)


def test_a_part_below_the_number_of_classes(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a", "b", "c"])
    with pytest.raises(ValueError, match="cannot hold all 3 classes"):
        load(tmp_path, train_limit=2)


def test_crops_and_flips_are_shifts_and_mirrors_and_nothing_else() -> None:
    images = torch.randint(1, 256, (40, 3, 6, 5), dtype=torch.uint8)
    augmented = random_crop_flip(images, torch.Generator().manual_seed(3), padding=2)
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    found = set()
    for image, result in zip(padded, augmented, strict=True):
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(_window(image, top, left, flip), result)
        ]
        assert matches
        found.add(matches[0])
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(5))
    assert {flip for _, _, flip in found} == {False, True}


def _window(padded: torch.Tensor, top: int, left: int, flip: bool) -> torch.Tensor:
    window = padded[:, top : top + 6, left : left + 5]
    return window.flip(-1) if flip else window


def test_augmentation_repeats_with_its_generator() -> None:
    images = torch.randint(256, (8, 3, 4, 4), dtype=torch.uint8)
    first, again, other = (
        random_crop_flip(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_normalisation() -> None:
    images = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8)
    values = Normalise(mean=(0.5, 0.25, 0.0), std=(0.1, 0.2, 0.4))(images)
    expected = (images.double() / 255 - torch.tensor([0.5, 0.25, 0.0]).view(3, 1, 1)) / (
        torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64).view(3, 1, 1)
    )
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
