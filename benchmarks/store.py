"""`python -m benchmarks.store FILE`: stores what `make gpu-suite` measured with other results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.results import RESULTS, FamilyResult, load, parse


def store_suite(path: Path, folder: Path = RESULTS) -> list[str]:
    """Store every family in the JSON file of `make gpu-suite`; a line about each.

    A family with fewer cases than are stored for that machine already stays out. Raises ValueError
    for a file that is none, or that was a rehearsal.
    """
    try:
        content = json.loads(path.read_text())
        families = [parse(family) for family in content["benchmarks"].values()]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the result of a GPU suite ({error!r})") from error
    if not families:
        raise ValueError(f"{path} holds no benchmark results; run `make gpu-suite ONLY=bench`")
    return [_store(family, folder) for family in families]


def _store(family: FamilyResult, folder: Path) -> str:
    target = family.path(folder)
    stored = len(load(target).cases) if target.exists() else 0
    if len(family.cases) < stored:
        return f"{family.family}: left out, {len(family.cases)} cases where {stored} are stored"
    family.store(folder)
    return f"{family.family}: {len(family.cases)} cases stored in {target}"


if __name__ == "__main__":
    try:
        print("\n".join(store_suite(Path(sys.argv[1]))))
    except (OSError, ValueError) as error:
        sys.exit(f"benchmarks.store: {error}")
