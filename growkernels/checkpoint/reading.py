"""Torch's checkpoints read without running what is pickled in them.

torch's own reader unpickles ``.metadata`` and the entries that are no tensors, by which a
checkpoint can call any function. Here both name data alone.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, state_dict_loader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from growkernels.saved_files import BoundedUnpickler, as_clause, look_over, read_saved

# What the index of a checkpoint is made of. Paths are plain strings, whatever their class; of torch
# there are sizes, dtypes, layouts and memory formats, none of which does anything.
_CLASSES = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
    )
}
_MAX_INDEX = 2**30  # bytes; of a model with 10,000 tensors on 64 ranks it has some 100 MB


class Reader(FileSystemReader):
    """A reader of one folder and of nothing else.

    ``read_metadata`` raises ValueError for an index that names code, is damaged, leads out of the
    folder or claims more than its files hold.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self.folder / ".metadata"
        damaged = f"{path} is not the index of a checkpoint"
        if path.stat().st_size > _MAX_INDEX:
            raise ValueError(f"{damaged}: it has more than {_MAX_INDEX:,} bytes.")
        index: Any = None
        try:
            index = _DataOnly(io.BytesIO(path.read_bytes())).load()
            if isinstance(index, Metadata):
                self._check(index)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{damaged} ({str(error)[:400]}); nothing of it was run.") from None
        except Exception as error:  # a broken pickle may raise anything
            raise ValueError(
                f"{damaged}, or is damaged ({type(error).__name__}); use another checkpoint."
            ) from error
        if not isinstance(index, Metadata):
            raise ValueError(f"{damaged}, but a {type(index).__name__}; use another checkpoint.")
        index.storage_meta = index.storage_meta or metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        part = super()._slice_file(file, sinfo)
        look_over(part)
        part.seek(0)
        return part

    def read_data(self, *args: Any, **kwargs: Any) -> Future[None]:
        try:
            return super().read_data(*args, **kwargs)
        except pickle.UnpicklingError as error:
            raise as_clause(error) from None

    def _check(self, index: Metadata) -> None:
        sizes: dict[str, int] = {}
        for info in index.storage_data.values():
            if getattr(info, "transform_descriptors", None):
                raise pickle.UnpicklingError("its entries are compressed")
            name = info.relative_path
            if type(name) is not str:
                raise pickle.UnpicklingError(f"it names a file by a {type(name).__name__}")
            if name in sizes:
                continue
            if Path(name).name != name or name == "..":
                raise pickle.UnpicklingError(f"it leads out of the folder, to {name!r}")
            file = self.folder / name
            if file.exists() and not file.resolve().is_relative_to(self.folder.resolve()):
                raise pickle.UnpicklingError(f"it leads out of the folder, by the link {name!r}")
            sizes[name] = file.stat().st_size if file.is_file() else 0
        held = left = sum(sizes.values())
        for key, entry in index.state_dict_metadata.items():
            if type(key) is not str:
                raise pickle.UnpicklingError(f"it names an entry by a {type(key).__name__}")
            if isinstance(entry, TensorStorageMetadata):
                left -= math.prod(entry.size) * entry.properties.dtype.itemsize
                if left < 0:
                    raise pickle.UnpicklingError(
                        f"with {key!r} its entries claim {held - left:,} bytes, and its files "
                        f"have {held:,}"
                    )


class _Planner(DefaultLoadPlanner):
    """Loads entries that are no tensors as plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        assert read_item.type is LoadItemType.BYTE_IO
        try:
            plain = read_saved(value)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{read_item.dest_index.fqn!r} is no plain value ({error}); nothing of it was run"
            ) from None
        value = io.BytesIO()
        torch.save(plain, value)
        value.seek(0)
        super().load_bytes(read_item, value)


def load_entries(wanted: dict[str, Any], folder: Path, no_dist: bool) -> None:
    """Fill ``wanted`` from the checkpoint in ``folder``, as torch's ``load`` does.

    Raises CheckpointException.
    """
    state_dict_loader.load(
        wanted, storage_reader=Reader(folder), planner=_Planner(), no_dist=no_dist
    )


class _DataOnly(BoundedUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        found: Any = _CLASSES.get((module, name))
        if found is not None:
            return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if module in ("pathlib", "pathlib._local") and name in ("Path", "PosixPath", "WindowsPath"):
            return _joined
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which is not allowed")


def _layout(name: str) -> torch.layout:
    layout = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(layout, torch.layout):
        raise pickle.UnpicklingError(f"it names a layout {name!r}, which there is not")
    return layout


def _joined(*parts: str) -> str:
    return "/".join(parts)
