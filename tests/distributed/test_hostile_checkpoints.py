"""Checkpoints and records that are damaged, or made to harm: one sentence, and nothing is run."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_pickle import Payload
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from growkernels import checkpoint
from growkernels.checkpoint import saving
from growkernels.checkpoint.layout import HEAD
from growkernels.growth import grow_state, insertions, rebuild
from growkernels.growth.offline import grow_file


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "saved", build(), extra={"step": 7})
    return tmp_path / "saved"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def refused(action: Callable[[], object], words: str, *errors: type[Exception]) -> None:
    with pytest.raises(errors or (ValueError, RuntimeError), match=words) as caught:
        action()
    assert "\n" not in str(caught.value)


def edit(folder: Path, change: Callable[[Metadata], Any]) -> None:
    index = FileSystemReader(folder).read_metadata()
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def test_an_unharmed_checkpoint_is_read(saved: Path) -> None:
    restored = checkpoint.load(saved, build)
    assert restored.extra == {"step": 7}
    edit(saved, lambda index: None)
    assert checkpoint.load(saved, build).extra == {"step": 7}


def test_the_payload_works_where_pickles_are_trusted(trace: Path) -> None:
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_an_index_with_code_is_refused(saved: Path, trace: Path, protocol: int) -> None:
    (saved / ".metadata").write_bytes(pickle.dumps(Payload(trace), protocol))
    refused(lambda: checkpoint.load(saved, build), "wants to load .*nothing of it was run")
    assert not trace.exists()


def test_an_index_with_code_inside_is_refused(saved: Path, trace: Path) -> None:
    edit(saved, lambda index: setattr(index, "planner_data", Payload(trace)))
    refused(lambda: checkpoint.load(saved, build), "wants to load .*nothing of it was run")
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x05]."])
def test_an_index_that_is_none(saved: Path, content: bytes) -> None:
    (saved / ".metadata").write_bytes(content)
    refused(lambda: checkpoint.load(saved, build), "is not the index of a checkpoint")


def test_a_huge_index_is_not_read(saved: Path) -> None:
    with (saved / ".metadata").open("wb") as file:
        file.truncate(1 << 42)  # sparse: it takes no room on the disk
    refused(lambda: checkpoint.load(saved, build), "has more than 1,073,741,824 bytes")


@pytest.mark.parametrize("content", [b"{", b'{"version": 1}', b"[]", b"[" * 100_000])
def test_a_head_that_is_none(saved: Path, content: bytes) -> None:
    replace_head(saved, content.decode())
    refused(lambda: checkpoint.load(saved, build), "The head of the checkpoint in .* is damaged")


@pytest.mark.parametrize(
    "changes", [{"ranks": 0}, {"drivers": 10**12}, {"drivers": -1}, {"drivers": 1}], ids=str
)
def test_a_head_that_tells_of_other_entries(saved: Path, changes: dict[str, int]) -> None:
    head = {"version": 1, "records": [], "frozen": [], "ranks": 1, "drivers": 0}
    # However many processes have left nothing are not counted one by one.
    replace_head(saved, json.dumps(head | {"ranks": 10**12}))
    checkpoint.load(saved, build)
    replace_head(saved, json.dumps(head | changes))
    refused(lambda: checkpoint.load(saved, build), "has not the entries that its head tells of")


@pytest.mark.parametrize("groups", [5, {"a": 1}, [5], [[5]], [[{"lr": 1}]], [[{"params": 5}]]])
def test_settings_of_optimizers_that_are_none(tmp_path: Path, groups: Any) -> None:
    plain = saving.packed_for_load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            saving,
            "packed_for_load",
            lambda value, what: plain(groups if what.startswith("A group") else value, what),
        )
        checkpoint.save(tmp_path / "saved", build())
    refused(
        lambda: checkpoint.load(
            tmp_path / "saved", build, None, lambda m: torch.optim.Adam(m.parameters())
        ),
        "'groups' of the checkpoint in .* cannot be read|settings of optimizers are damaged",
    )


@pytest.mark.parametrize("gone", ["groups", "extra"])
def test_entries_that_are_missing(saved: Path, gone: str) -> None:
    edit(saved, lambda index: index.state_dict_metadata.pop(gone))
    refused(lambda: checkpoint.load(saved, build), "has not the entries that its head tells of")


def test_a_head_with_code_is_refused(saved: Path, trace: Path) -> None:
    replace_head(saved, Payload(trace))
    refused(lambda: checkpoint.load(saved, build), "tensors and plain values.; nothing of it")
    assert not trace.exists()


def replace_head(folder: Path, head: Any) -> None:
    """Appends it to the file of the entries, and points the index there."""
    file = io.BytesIO()
    torch.save(head, file)

    def change(index: Metadata) -> None:
        (info,) = (i for k, i in index.storage_data.items() if k.fqn == HEAD)
        path = folder / info.relative_path
        info.offset, info.length = path.stat().st_size, len(file.getvalue())
        with path.open("ab") as entries:
            entries.write(file.getvalue())

    edit(folder, change)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "a/../../b"])
def test_entries_lie_in_the_folder(saved: Path, name: str) -> None:
    def change(index: Metadata) -> None:
        for info in index.storage_data.values():
            info.relative_path = name

    edit(saved, change)
    refused(lambda: checkpoint.load(saved, build), "it leads out of the folder")


def test_links_out_of_the_folder_are_refused(saved: Path, tmp_path: Path) -> None:
    (file,) = saved.glob("*.distcp")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    refused(lambda: checkpoint.load(saved, build), "by the link '__0_0.distcp'")


def test_an_entry_cannot_claim_more_than_there_is(saved: Path) -> None:
    edit(saved, lambda i: setattr(i.state_dict_metadata["extra"], "size", torch.Size([1 << 50])))
    refused(
        lambda: checkpoint.load(saved, build),
        "'extra' its entries claim 1,125,899,90.,...,... bytes",
    )


def test_entries_cannot_claim_the_same_bytes_each(saved: Path) -> None:
    def change(index: Metadata) -> None:
        entry = index.state_dict_metadata["extra"]
        index.state_dict_metadata |= {f"model/{n}": entry for n in range(1000)}

    edit(saved, change)
    refused(lambda: checkpoint.load(saved, build), "its entries claim .* bytes, and its files have")


@pytest.mark.parametrize("where", ["file", "entry"])
def test_names_are_strings(saved: Path, where: str) -> None:
    """Nested tuples of one another are few bytes of a pickle, and endless where they are shown."""
    endless: Any = ()
    for _ in range(200):
        endless = (endless, endless)

    def change(index: Metadata) -> None:
        if where == "file":
            next(iter(index.storage_data.values())).relative_path = endless
        else:
            index.state_dict_metadata[("a", "b")] = index.state_dict_metadata["extra"]  # type: ignore[index]

    edit(saved, change)
    refused(lambda: checkpoint.load(saved, build), "it names an? .* by a tuple")


def test_entries_are_not_inflated(saved: Path) -> None:
    def change(index: Metadata) -> None:
        for info in index.storage_data.values():
            info.transform_descriptors = ["stream.zstd/1"]

    edit(saved, change)
    refused(lambda: checkpoint.load(saved, build), "its entries are compressed")


def test_truncated_entries_are_one_sentence(saved: Path) -> None:
    (file,) = saved.glob("*.distcp")
    os.truncate(file, file.stat().st_size // 2)
    refused(lambda: checkpoint.load(saved, build), "The checkpoint in .* cannot be read")


def test_torch_still_writes_what_is_allowed(tmp_path: Path) -> None:
    """Dtypes, 0-d and empty tensors, and plain values of a checkpoint of torch's own."""
    from torch.distributed.checkpoint import state_dict_saver

    from growkernels.checkpoint.reading import Reader, load_entries

    state: dict[str, Any] = {
        "a": torch.ones(2, 3, dtype=torch.bfloat16),
        "b": torch.tensor(3),
        "c": torch.empty(0, 4, dtype=torch.float64),
        "d": {"e": [1, "x"]},
    }
    state_dict_saver.save(state, storage_writer=FileSystemWriter(tmp_path / "c"), no_dist=True)
    assert set(Reader(tmp_path / "c").read_metadata().state_dict_metadata) >= {"a", "b", "c"}
    blank = {k: torch.zeros_like(v) for k, v in state.items() if isinstance(v, torch.Tensor)}
    load_entries(blank, tmp_path / "c", no_dist=True)
    assert all(torch.equal(blank[key], state[key]) for key in blank)


@pytest.mark.parametrize("content", ["code", "truncated", "nonsense", "empty"])
def test_a_file_that_is_to_grow(tmp_path: Path, trace: Path, content: str) -> None:
    path, out = tmp_path / "checkpoint.pt", tmp_path / "grown.pt"
    torch.save(
        {"model": build().state_dict(), "x": Payload(trace) if content == "code" else 1}, path
    )
    if content != "code":
        whole = path.read_bytes()
        changed = {"truncated": whole[:200], "nonsense": b"nonsense", "empty": b""}
        path.write_bytes(changed[content])
    refused(lambda: grow_file(path, [], out, build), "cannot be read as tensors and plain values")
    assert not trace.exists()
    assert not out.exists()


@pytest.mark.parametrize(
    "record",
    [
        {"kind": ["neurons"]},
        {"kind": None},
        {"kind": "neurons", "version": "1"},
        {"kind": "neurons", "version": None},
        {"kind": "neurons", "version": 1.5},
    ],
    ids=str,
)
def test_records_of_a_wrong_schema(record: dict[str, Any]) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refused(lambda: rebuild(model, record), "Record 0 of the growth has a 'kind' that is no")
    refused(
        lambda: grow_state(record, model.state_dict(), build=build), "Record 0 of the growth has"
    )
    assert insertions(model) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
