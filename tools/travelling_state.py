"""A run's folder as a few files of limited size, to go on with it on another machine."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from pathlib import Path

PART_BYTES = 15 * 2**20
TOTAL_BYTES = 58 * 2**20
_PART_NAME = "state.tar.{:02d}"
# A lock is of one machine, and decoded images are read anew from the data.
_LEFT_BEHIND = (".lock", "state/images.pt")


def pack(run: Path, out: Path, total: int = TOTAL_BYTES, part: int = PART_BYTES) -> list[str]:
    """Write `run` as parts of a tar archive into `out`, replacing older ones; what did not fit.

    Smaller files go first: they say what is finished. A checkpoint that does not fit is computed
    anew from the one before it, or from the beginning of its training.
    """
    found = (path for path in run.rglob("*") if path.is_file())
    files = [path for path in found if str(path.relative_to(run)) not in _LEFT_BEHIND]
    files.sort(key=lambda path: (path.stat().st_size, path))
    left_out, size = [], 0
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as whole:
        with tarfile.open(fileobj=whole, mode="w") as archive:
            for path in files:
                size += path.stat().st_size + 2048  # its header, and padding
                name = str(path.relative_to(run))
                if size > total:
                    left_out.append(name)
                else:
                    archive.add(path, name)
        for old in _parts(out):
            old.unlink()
        whole.seek(0)
        for number, data in enumerate(iter(lambda: whole.read(part), b"")):
            (out / _PART_NAME.format(number)).write_bytes(data)
    return left_out


def unpack(source: Path, run: Path) -> None:
    """Make the folder `run`, which is not there yet, from the parts in `source`.

    Raises FileNotFoundError where there are none, RuntimeError for a part that is missing, and for
    an archive that is damaged or leads out of the folder; then nothing is left there.
    """
    parts = _parts(source)
    if not parts:
        raise FileNotFoundError(f"{source} holds no state of a run; leave --from out to begin one")
    if [path.name for path in parts] != [_PART_NAME.format(n) for n in range(len(parts))]:
        raise RuntimeError(f"{source} lacks a part of the state; copy all of its state.tar.* there")
    run.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run.parent) as folder, tempfile.TemporaryFile() as whole:
        for path in parts:
            with path.open("rb") as part:
                shutil.copyfileobj(part, whole)
        whole.seek(0)
        new = Path(folder) / run.name
        try:
            # "r:" opens no compressed archive, so that what comes out is as large as what came.
            with tarfile.open(fileobj=whole, mode="r:") as archive:
                archive.extractall(new, filter=_plain_files)
        except tarfile.TarError as error:
            raise RuntimeError(f"{source} holds a damaged state ({error}); copy it anew") from error
        shutil.move(new, run)


def _plain_files(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """What `pack` writes: files inside the folder, without links, devices and holes."""
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise tarfile.TarError(f"{member.name!r} is no plain file")
    if Path(member.name).is_absolute():
        raise tarfile.TarError(f"{member.name!r} leads out of the folder")
    return tarfile.data_filter(member, folder)


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("state.tar.[0-9][0-9]"))
