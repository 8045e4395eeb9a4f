"""Files of ``torch.save`` and pickles from elsewhere, read as data and within their own size.

``torch.load(weights_only=True)`` runs no code, but inflates what is compressed and makes a
``bytearray`` of any length, by which a file of a few kB takes all memory. Every file is looked over
here before torch reads it: no more memory is taken than a few times what the file has on the disk.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch.serialization import StorageType

# The end of a zip as torch writes it: the 64-bit end of the directory, where that is, and the plain
# end, without a comment. An entry of the directory is followed by its name, extra and comment.
_END_64 = struct.Struct("<4sQHHLLQQQQ")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4sHHHHLLH")
_ENTRY = struct.Struct("<4sHHHHHHLLLHHHHHLL")
_LOCAL = struct.Struct("<4sHHHHHLLLHH")
_IN_EXTRA = 2**32 - 1  # instead of a number of 32 bits: it has 64, and lies in the extra
_FOREIGN = "torch.save of torch 1.6 or newer did not write it"


def read_saved(source: Path | IO[bytes], mmap: bool = False) -> Any:
    """What ``torch.save`` wrote: tensors on the CPU, plain values and containers of them.

    Args:
        source: a file, or one that is open for reading and can seek.
        mmap: map the tensors of a file (given by its path) instead of reading them.

    Raises:
        pickle.UnpicklingError: one clause on what is wrong with the file; nothing of it was run.
        OSError: it cannot be opened.
    """
    with _told():
        if not isinstance(source, Path):
            look_over(source)
            source.seek(0)
            return torch.load(source, map_location="cpu", weights_only=True)
        with source.open("rb") as file:
            look_over(file)
            file.seek(0)
            given: Any = os.fspath(source) if mmap else file
            return torch.load(given, map_location="cpu", weights_only=True, mmap=mmap)


@contextmanager
def _told() -> Iterator[None]:
    """Let whatever a damaged file raises be an UnpicklingError of one line."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise as_clause(error) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise pickle.UnpicklingError(f"it is damaged ({type(error).__name__})") from error


def as_clause(error: pickle.UnpicklingError) -> pickle.UnpicklingError:
    """Torch advises, in many lines, to trust a file that it refuses; ours stay as they are."""
    if "torch.load" not in str(error):
        return error
    return pickle.UnpicklingError("it holds more than tensors and plain values")


def look_over(file: IO[bytes]) -> None:
    """Raise ``pickle.UnpicklingError`` for what takes more memory than the file has, or is no file
    of ``torch.save``.
    """
    with _told():
        members = _members(file)
        pickles = [name for name in members if name.endswith(b"/data.pkl")]
        if len(pickles) != 1:
            raise pickle.UnpicklingError(_FOREIGN)
        start, size = members[pickles[0]]
        folder = pickles[0].removesuffix(b"data.pkl") + b"data/"
        sizes = {
            name.removeprefix(folder): size
            for name, (_, size) in members.items()
            if name.startswith(folder)
        }
        file.seek(start)
        name_size, extra_size = _unpack(_LOCAL, file.read(_LOCAL.size), b"PK\3\4")[-2:]
        file.seek(name_size + extra_size, os.SEEK_CUR)
        _Claims(file.read(size), sizes).load()


def _unpack(layout: struct.Struct, data: bytes, signature: bytes) -> tuple[Any, ...]:
    if len(data) != layout.size or not data.startswith(signature):
        raise pickle.UnpicklingError(_FOREIGN)
    return layout.unpack(data)[1:]


def _members(file: IO[bytes]) -> dict[bytes, tuple[int, int]]:
    """The place of each member's header and its size, by names as torch compares them: without
    regard to case. The directory is read where torch's reader reads it.
    """
    file.seek(0, os.SEEK_END)
    whole = file.tell()
    end = whole - _END_64.size - _LOCATOR.size - _END.size
    if end < 0:
        raise pickle.UnpicklingError(_FOREIGN)
    file.seek(end)
    *_, number, size, start = _unpack(_END_64, file.read(_END_64.size), b"PK\6\6")
    _, place, _ = _unpack(_LOCATOR, file.read(_LOCATOR.size), b"PK\6\7")
    *_, comment = _unpack(_END, file.read(_END.size), b"PK\5\6")
    if comment or place != end or start + size != end:
        raise pickle.UnpicklingError(_FOREIGN)
    members: dict[bytes, tuple[int, int]] = {}
    left = whole
    file.seek(start)
    for _ in range(number):
        entry = _unpack(_ENTRY, file.read(_ENTRY.size), b"PK\1\2")
        flags, method, packed, size, place = entry[2], entry[3], *entry[7:9], entry[-1]
        name = file.read(entry[9]).lower()
        extra = file.read(entry[10])
        file.seek(entry[11], os.SEEK_CUR)
        size, packed, place = _wide((size, packed, place), extra)
        if method or flags & 1 or packed != size:
            raise pickle.UnpicklingError("parts of it are compressed, which torch.save never does")
        left -= size
        if left < 0:
            raise pickle.UnpicklingError(
                f"its parts claim more bytes than the {whole:,} that it has"
            )
        if name in members:
            raise pickle.UnpicklingError(f"it has two parts with the name {name!r}")
        members[name] = place, size
    return members


def _wide(numbers: tuple[int, ...], extra: bytes) -> list[int]:
    """Numbers of a directory's entry, of which large ones are in the extra, one after the other."""
    large = numbers.count(_IN_EXTRA)
    if not large:
        return list(numbers)
    kind, size = struct.unpack_from("<HH", extra.ljust(4, b"\0"))
    if kind != 1 or not 8 * large <= size <= len(extra) - 4:
        raise pickle.UnpicklingError(_FOREIGN)
    found = iter(struct.unpack_from(f"<{large}Q", extra, 4))
    return [next(found) if number == _IN_EXTRA else number for number in numbers]


class BoundedUnpickler(pickle._Unpickler):
    """Takes no more memory than a few times its pickle's bytes, besides what ``find_class`` gives.

    The one in C makes a table of as many entries as a number in the pickle says.
    """

    # It makes a bytearray of the claimed size before it reads any byte of it.
    dispatch: ClassVar = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]
    }


class _Inert:
    """Stands for what torch would make: takes everything and does nothing."""

    def __new__(cls, *args: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _NeverCalled(_Inert):
    """Stands for classes of storages and tensors: torch.save names them, and nothing more.

    Called with a number they would take that much memory.
    """

    def __new__(cls, *args: Any) -> _NeverCalled:
        raise pickle.UnpicklingError("it makes storages or tensors that it does not hold")


@lru_cache
def _storage(name: str) -> type[_NeverCalled]:
    """Stands for a class of storages; knows how many bytes an element takes."""
    if name == "UntypedStorage":
        return type(name, (_NeverCalled,), {"bytes": 1})
    try:
        dtype = StorageType(name).dtype
    except KeyError:
        return _NeverCalled
    return type(name, (_NeverCalled,), {"bytes": dtype.itemsize})


def _bytearray(*args: Any) -> _Inert:
    if any(isinstance(argument, int) for argument in args):
        raise pickle.UnpicklingError("it makes a bytearray that it does not hold")
    return _Inert()


class _Claims(BoundedUnpickler):
    """Goes through the pickle of a file of ``torch.save`` without making anything of it.

    Raises UnpicklingError where a storage claims more than its part of the file has.
    """

    def __init__(self, content: bytes, sizes: Mapping[bytes, int]) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "torch":
            if name.endswith("Storage"):
                return _storage(name)
            if name.endswith("Tensor"):
                return _NeverCalled
        if name == "bytearray":  # of builtins, in older pickles of __builtin__
            return _bytearray
        return _Inert

    def persistent_load(self, pid: Any) -> _Inert:
        if type(pid) is not tuple or len(pid) != 5:
            raise pickle.UnpicklingError(_FOREIGN)
        _, kind, key, _, number = pid
        size = getattr(kind, "bytes", None)
        if type(key) is not str or type(number) is not int or size is None:
            raise pickle.UnpicklingError(_FOREIGN)
        held = self.sizes.get(key.lower().encode(), 0)
        if not 0 <= number * size <= held:
            raise pickle.UnpicklingError(
                f"storage {key!r} claims {number * size:,} bytes, and has {held:,}"
            )
        return _Inert()
