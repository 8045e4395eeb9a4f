"""Files of torch.save that are made to harm, at each door that takes one: one sentence, nothing is
run, and no more memory is taken than the file has.
"""

from __future__ import annotations

import io
import pickle
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_pickle import Payload
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from growkernels import checkpoint
from growkernels.checkpoint import saving
from growkernels.checkpoint.layout import HEAD
from growkernels.experiments.images.store import stored_images
from growkernels.experiments.run_folder import StateStore
from growkernels.growth.offline import grow_file
from growkernels.saved_files import BoundedUnpickler, read_saved

INFLATED = 2**28  # bytes of a bomb, when it goes off
ALLOWED = 2**26


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class Claim:
    """Pickled as a call of a class that takes memory by a number."""

    def __init__(self, kind: type, number: int) -> None:
        self.called = kind, (number,)

    def __reduce__(self) -> Any:
        return self.called


def saved(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(
    members: list[tuple[str, int, bytes, int]], entries: int = 1, ends: bool = True
) -> bytes:
    """An archive as torch writes it; `members`: name, method, packed bytes, bytes unpacked.

    `entries` in the directory lead to each of them.
    """
    content = directory = b""
    number = 0
    for name, method, data, size in members:
        numbers = (0, 0, method, 0, 0, 0, len(data), size, len(name))
        for copy in range(entries):
            named = name if copy == 0 else f"{name}{copy}"
            number += 1
            directory += struct.pack(
                "<4sHHHHHHLLLHHHHHLL", b"PK\1\2", 0, *numbers[:-1], len(named), 0, 0, 0, 0, 0,
                len(content),
            ) + named.encode()  # fmt: skip
        content += struct.pack("<4sHHHHHLLLHH", b"PK\3\4", *numbers, 0) + name.encode() + data
    start, end = len(content), len(content) + len(directory)
    if ends:
        directory += struct.pack(
            "<4sQHHLLQQQQ", b"PK\6\6", 44, 0, 45, 0, 0, number, number, end - start, start
        ) + struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    number = min(number, 0xFFFF)
    last = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, number, number, end - start, start, 0)
    return content + directory + last


def repacked(deflated: str = "", entries: int = 1, ends: bool = True) -> bytes:
    """A saved tensor in an archive anew, one part of it many zeros when it is inflated."""
    members = []
    few = 2**16 + 1
    with zipfile.ZipFile(io.BytesIO(saved({"model": torch.zeros(few)}))) as archive:
        for info in archive.infolist():
            data, name = archive.read(info), info.filename
            if name.endswith("data.pkl"):
                as_saved, many = struct.pack("<i", few), struct.pack("<i", INFLATED // 4)
                assert data.count(as_saved) == 2  # its storage, and its size
                data = data.replace(as_saved, many)
            if deflated and name.endswith(deflated):
                packer = zlib.compressobj(1, zlib.DEFLATED, -15)
                packed = packer.compress(data)
                for _ in range(len(data), INFLATED, 2**20):
                    packed += packer.compress(bytes(2**20))
                members.append((name, 8, packed + packer.flush(), INFLATED))
            else:
                members.append((name, 0, data, len(data)))
    return zipped(members, entries, ends)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "deflated storage": (lambda: repacked("data/0"), "parts of it are compressed"),
    "deflated pickle": (lambda: repacked("data.pkl"), "parts of it are compressed"),
    "parts that overlap": (lambda: repacked("", 500), "its parts claim more bytes than the"),
    "storage beyond its part": (lambda: repacked(), "storage '0' claims 268,435,456 bytes, and"),
    "bytearray": (lambda: saved(Claim(bytearray, INFLATED)), "makes a bytearray that it does not"),
    "storage from nothing": (
        lambda: saved(Claim(torch.UntypedStorage, INFLATED)), "makes storages or tensors that",
    ),
    "tensor from nothing": (
        lambda: saved(Claim(torch.FloatTensor, INFLATED // 4)), "makes storages or tensors that",
    ),
    "another zip": (lambda: repacked("", 1, False), "torch.save of torch 1.6 or newer did not"),
    "no zip": (
        lambda: saved(torch.ones(3), _use_new_zipfile_serialization=False),
        "torch.save of torch 1.6 or newer did not",
    ),
    "nonsense": (lambda: b"nonsense" * 100, "torch.save of torch 1.6 or newer did not"),
    "empty": (lambda: b"", "torch.save of torch 1.6 or newer did not"),
    "truncated": (lambda: saved(torch.ones(3))[:-30], "torch.save of torch 1.6 or newer did not"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bombs() -> dict[str, tuple[bytes, str]]:
    """Built once, before memory is measured."""
    return {name: (make(), words) for name, (make, words) in BOMBS.items()}


def growing(folder: Path, content: bytes) -> object:
    (folder / "checkpoint.pt").write_bytes(content)
    return grow_file(folder / "checkpoint.pt", [], folder / "grown.pt", build)


def state_of_a_run(folder: Path, content: bytes) -> object:
    (folder / "part.pt").write_bytes(content)
    return StateStore(folder).load("part")


def images_of_a_run(folder: Path, content: bytes) -> object:
    (folder / "images.pt").write_bytes(content)
    return stored_images(folder / "images.pt")


def entry_of_a_checkpoint(name: str) -> Callable[[Path, bytes], object]:
    """Appended to the file of the entries, where the index then leads to."""

    def door(folder: Path, content: bytes) -> object:
        saving.save(folder / "saved", build())
        index = FileSystemReader(folder / "saved").read_metadata()
        (info,) = (i for k, i in index.storage_data.items() if k.fqn == name)
        path = folder / "saved" / info.relative_path
        info.offset, info.length = path.stat().st_size, len(content)
        with path.open("ab") as entries:
            entries.write(content)
        (folder / "saved" / ".metadata").write_bytes(pickle.dumps(index))
        return checkpoint.load(folder / "saved", build)

    return door


def packed_in_a_checkpoint(folder: Path, content: bytes) -> object:
    plain = saving.packed_for_load
    with pytest.MonkeyPatch.context() as patch:

        def packed(value: object, what: str) -> torch.Tensor:
            given = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)
            return given if what == "extra" else plain(value, what)

        patch.setattr(saving, "packed_for_load", packed)
        saving.save(folder / "saved", build())
    return checkpoint.load(folder / "saved", build)


DOORS: dict[str, Callable[[Path, bytes], object]] = {
    "a file that is to grow": growing,
    "the state of a run": state_of_a_run,
    "the images of a run": images_of_a_run,
    "the head of a checkpoint": entry_of_a_checkpoint(HEAD),
    "a tensor of a checkpoint": entry_of_a_checkpoint("model/0.weight"),
    "extra of a checkpoint": packed_in_a_checkpoint,
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("door", DOORS)
def test_bombs_are_refused(
    tmp_path: Path, bombs: dict[str, tuple[bytes, str]], door: str, bomb: str
) -> None:
    content, words = bombs[bomb]
    before = peak_bytes()
    with pytest.raises((ValueError, RuntimeError), match=words) as caught:
        DOORS[door](tmp_path, content)
    assert "\n" not in str(caught.value)
    assert peak_bytes() - before < ALLOWED


@pytest.mark.parametrize("door", DOORS)
def test_code_is_not_run(tmp_path: Path, door: str) -> None:
    trace = tmp_path / "trace"
    with pytest.raises(
        (ValueError, RuntimeError), match="holds more than tensors and plain"
    ) as caught:
        DOORS[door](tmp_path, saved({"model": Payload(trace)}))
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_number_in_a_pickle_is_no_size_of_a_table() -> None:
    class Nothing(BoundedUnpickler):
        def find_class(self, module: str, name: str) -> Any:
            raise AssertionError

    before = peak_bytes()
    put = b"\x80\x02Nr" + struct.pack("<I", INFLATED // 8) + b"."
    assert Nothing(io.BytesIO(put)).load() is None
    with pytest.raises(KeyError):
        Nothing(io.BytesIO(b"\x80\x05\x96" + struct.pack("<Q", INFLATED) + b".")).load()
    assert peak_bytes() - before < ALLOWED


@pytest.mark.parametrize("mmap", [False, True])
def test_what_torch_writes_is_read(tmp_path: Path, mmap: bool) -> None:
    values: dict[str, Any] = {
        "float": torch.arange(6.0).view(2, 3),
        "slice": torch.arange(100)[10:20],
        "expanded": torch.ones(1).expand(4, 5),
        "transposed": torch.arange(6).view(2, 3).t(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(True),
        "parameter": nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "eight bits": torch.ones(3).to(torch.float8_e4m3fn),
        "unsigned": torch.ones(3, dtype=torch.uint16),
        "complex": torch.ones(3, dtype=torch.complex64),
        "sparse": torch.eye(3).to_sparse(),
        "plain": [1, -(2**70), 0.5, "x", None, True, {1, 2}, (3,), b"\xff", bytearray(b"b"), 1j],
        "of torch": [torch.Size([1, 2]), torch.float16, torch.device("cpu"), torch.strided],
    }
    values["twice"] = values["float"]
    torch.save(values, tmp_path / "values.pt")
    found = read_saved(tmp_path / "values.pt", mmap)
    assert list(found) == list(values)
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            assert found[name] == value
        else:
            assert found[name].dtype == value.dtype
            assert found[name].to_dense().tolist() == value.to_dense().tolist()
    assert found["twice"].untyped_storage().data_ptr() == found["float"].data_ptr()


def test_large_parts_have_their_numbers_elsewhere_in_the_directory(tmp_path: Path) -> None:
    """Beyond 4 GiB: written sparse, and looked over without reading the storage."""
    path = tmp_path / "large.pt"
    torch.use_deterministic_algorithms(False)  # which fill what is made here
    with torch.serialization.skip_data():
        torch.save({"a": torch.empty(5 * 2**30, dtype=torch.uint8), "b": torch.ones(3)}, path)
    assert path.stat().st_size > 5 * 2**30
    before = peak_bytes()
    assert read_saved(path, mmap=True)["a"].shape == (5 * 2**30,)
    assert peak_bytes() - before < ALLOWED
