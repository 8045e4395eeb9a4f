"""A run's images, decoded once into a file that its later commands and all workers map."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from growkernels.experiments.images.folders import ImageData, load_images, stored_size
from growkernels.experiments.images.synthetic_images import synthetic_images
from growkernels.experiments.run_folder import FOREIGN, RunFolderError
from growkernels.experiments.seeds import seeded
from growkernels.saved_files import read_saved

DATA_SEED = 1


@dataclass(frozen=True)
class Selection:
    """How much of a data set a run uses; None: all.

    Images that are larger than ``small``, or not square, become squares of ``square`` pixels (None:
    all have one size, which is kept). Without a data set ``synthetic_classes`` classes of images
    of ``synthetic_size`` pixels are generated.
    """

    train: int | None
    test: int | None
    classes: int | None = None
    small: int | None = None
    square: int | None = None
    synthetic_size: int = 32
    synthetic_classes: int = 5


def provide_images(
    path: Path,
    folder: Path | None,
    selection: Selection,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Make sure that the selected images lie in ``path``; their description.

    ``folder`` None: generated ones. Raises what ``load_images`` raises, and RunFolderError for a
    file that cannot be written or read.
    """
    source = {"folder": folder and str(folder.resolve()), **asdict(selection)}
    store_images(path, source, lambda: _make(folder, selection, progress))
    return describe_images(stored_images(path))


def _make(
    folder: Path | None, selection: Selection, progress: Callable[[int, int], None] | None
) -> ImageData:
    if folder is None:
        assert selection.train is not None
        assert selection.test is not None
        return synthetic_images(
            selection.train,
            selection.test,
            seeded(DATA_SEED),
            size=selection.synthetic_size,
            classes=selection.synthetic_classes,
        )
    square = None
    if selection.small is not None:
        height, width = stored_size(folder)
        square = None if height == width <= selection.small else selection.square
    return load_images(
        folder,
        seeded(DATA_SEED),
        train_limit=selection.train,
        test_limit=selection.test,
        class_limit=selection.classes,
        square=square,
        progress=progress,
    )


def describe_images(images: ImageData) -> dict[str, Any]:
    """What a report and a configuration say about the data; the sum tells data sets apart."""
    return {
        "name": images.name,
        "classes": len(images.classes),
        "train_images": len(images.train_images),
        "test_images": len(images.test_images),
        "size": "x".join(map(str, images.train_images.shape[2:])),
        "sum": int(images.train_images.sum()) + int(images.test_images.sum()),
    }


def store_images(path: Path, source: Mapping[str, Any], make: Callable[[], ImageData]) -> None:
    """Make sure that ``path`` holds the images that ``source`` (plain values) describes.

    They are made and written, to a temporary name that is then renamed, unless a file made for an
    equal source is there.
    """
    if path.exists() and _read(path)[0] == dict(source):
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
    return _read(path)[1]


@lru_cache(maxsize=1)
def images_on(path: Path, device: str) -> ImageData:
    """The study's images, resident on the device for all trainings of a process."""
    data = stored_images(path)
    size = data.train_images.nbytes + data.test_images.nbytes
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        if size > 0.8 * free:
            raise RuntimeError(
                f"The images take {size / 2**30:.1f} GiB and have to lie on the device, which has "
                f"{free / 2**30:.1f} GiB free; use a GPU with more memory or smaller images."
            )
    return data.to(device)


@dataclass(frozen=True)
class ImageSource:
    """The file of a run's images, their description, and the device that they are used on."""

    path: Path
    about: dict[str, Any]
    device: str

    @property
    def images(self) -> ImageData:
        return images_on(self.path, self.device)


def _read(path: Path) -> tuple[dict[str, Any], ImageData]:
    try:
        stored = read_saved(path, mmap=True)
        data = stored["data"]
        images = ImageData(**{**data, "classes": tuple(data["classes"])})
        return dict(stored["source"]), images
    except (UnpicklingError, OSError) as error:
        raise _useless(path, f"cannot be read ({error})") from error
    except FOREIGN as error:
        raise _useless(path, f"does not hold images ({type(error).__name__})") from error


def _useless(path: Path, why: str) -> RunFolderError:
    return RunFolderError(
        f"{path} {why}; delete it and use --resume again to decode the images anew."
    )
