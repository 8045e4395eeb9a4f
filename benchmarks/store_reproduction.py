"""`python -m benchmarks.store_reproduction FOLDER`: what belongs in docs from a reproduction's run.

Its summary.json and the pictures that the documents show go to `docs/evidence/NAME`, and the
documents' tables are written anew. Of a study to which more runs can be added `trainings.tar.xz`
goes there too: unpacked into a folder, `growkernels reproduce` goes on in it on any machine.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import readme_tables
from benchmarks.claims_table import DOCUMENTS, REPRODUCTIONS
from growkernels.saved_files import read_saved

COLOURS = 64  # of a stored picture; more than its lines and bands have


def store(run: Path, documents: Path = DOCUMENTS) -> Path:
    """Copies what belongs there; the folder it went to.

    Raises ValueError for a folder without a finished run, for a run of the quick preset, which
    decides nothing, and for one of files that differ from their commit.
    """
    path = run / "summary.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; finish the run with --resume first")
    summary = json.loads(path.read_text())
    kind = summary["experiment"], summary.get("net")
    found = [r for r in REPRODUCTIONS if (r.experiment, r.net) == kind]
    if not found or summary["preset"] == "quick":
        raise ValueError(f"{run} is a run of {summary['preset']} {kind[0]}; no document shows it")
    commits = (summary["environment"]["commit"], summary["registration"]["commit"])
    if not all(commit and not commit.endswith("+") for commit in commits):
        raise ValueError(
            f"{run} ran from files that differ from their commit; run it from a clean one"
        )
    target = documents / found[0].folder
    target.mkdir(parents=True, exist_ok=True)
    for name in found[0].pictures:
        with Image.open(run / "plots" / f"{name}.png") as picture:
            small = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            small.save(target / f"{name}.png", optimize=True)
    shutil.copyfile(path, target / path.name)
    if summary.get("runs") is not None:
        _archive(run, target / "trainings.tar.xz")
    return target


def _archive(run: Path, path: Path) -> None:
    """What the finished trainings measured, without their weights, which nothing begins with."""
    with tarfile.open(path, "w:xz") as archive:
        states = sorted(p for p in (run / "state").iterdir() if p.suffix in (".pt", ".jsonl"))
        for file in (run / "config.json", run / "summary.json", *states):
            content = file.read_bytes() if file.suffix != ".pt" else _measured(read_saved(file))
            member = tarfile.TarInfo(str(file.relative_to(run)))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _measured(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state | {"state": None} if "state" in state else state, buffer)
    return buffer.getvalue()


def main() -> int:
    try:
        print(f"stored in {store(Path(sys.argv[1]))}")
    except (IndexError, OSError, ValueError) as error:
        print(f"benchmarks.store_reproduction: {error}", file=sys.stderr)
        return 1
    return readme_tables.main()


if __name__ == "__main__":
    sys.exit(main())
