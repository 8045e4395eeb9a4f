"""`python -m benchmarks.readme_tables`: the documents' tables and picture, from stored results.

A table stands between the markers `<!-- table: NAME -->` and `<!-- end table -->` in one of the
documents; NAME is the name of a TABLE that a family declares, of a reproduction's table of claims,
or of the headlines. Nothing is measured here.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from benchmarks.claims_table import CLAIMS, Reproduction, StudyTable
from benchmarks.families import family_files, load_family
from benchmarks.gpu_table import GPU_TABLE, GpuTable
from benchmarks.headlines import HEADLINES, HeadlineTable
from benchmarks.results import RESULTS, stored
from benchmarks.speed_plot import draw
from benchmarks.table import Table

_ROOT = Path(__file__).resolve().parent.parent
_DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/evidence.md", "docs/gpu.md")
_PICTURE = "docs/speed.png"
# Up to the next end marker, but never across the beginning of another table.
_BLOCK = re.compile(
    r"<!-- table: ([^>]+?) -->\n(?:(?!<!-- table: ).)*?<!-- end table -->", re.DOTALL
)

AnyTable: TypeAlias = Table | Reproduction | StudyTable | HeadlineTable | GpuTable


def regenerate(
    documents: Mapping[str, str],
    tables: Sequence[AnyTable],
    results: Path = RESULTS,
) -> dict[str, str]:
    """The documents' texts, by name, with every table brought up to date.

    Raises ValueError where a table's marker is missing, incomplete or unknown, and
    FileNotFoundError where nothing is stored for its family.
    """
    by_name = {table.name: table for table in tables}
    unplaced = set(by_name)
    for document, text in documents.items():
        complete = [match.group(1) for match in _BLOCK.finditer(text)]
        for name in re.findall(r"<!-- table: ([^>]+?) -->", text):
            if name not in by_name:
                raise ValueError(
                    f"{document} marks a table {name!r} that no benchmark family declares"
                )
            if name not in complete:
                raise ValueError(f"{document}'s table {name!r} lacks its <!-- end table --> marker")
            unplaced.discard(name)
    for name in sorted(unplaced):
        raise ValueError(
            f"no document has a place for the table {name!r}; add the two lines "
            f"'<!-- table: {name} -->' and '<!-- end table -->' where it belongs"
        )

    def block(match: re.Match[str]) -> str:
        table = by_name[match.group(1)]
        return f"<!-- table: {table.name} -->\n{_markdown(table, results)}\n<!-- end table -->"

    return {document: _BLOCK.sub(block, text) for document, text in documents.items()}


def _markdown(table: AnyTable, results: Path) -> str:
    if isinstance(table, (Reproduction, StudyTable)):
        return table.markdown()
    if isinstance(table, (HeadlineTable, GpuTable)):
        return table.markdown(results)
    family = stored(table.family, results)
    if not family:
        raise FileNotFoundError(
            f"no results of {table.family!r} are stored in {results}; "
            f"run 'growkernels bench {table.family}' first"
        )
    return table.markdown(family)


def main() -> int:
    families = [load_family(path) for path in family_files().values()]
    tables = [*(family.TABLE for family in families), *CLAIMS, HEADLINES, GPU_TABLE]
    try:
        old = {document: (_ROOT / document).read_text() for document in _DOCUMENTS}
        new = regenerate(old, tables)
        draw(HEADLINES.headlines, RESULTS, _ROOT / _PICTURE)
    except (FileNotFoundError, ValueError) as error:
        print(f"readme-tables: {error}", file=sys.stderr)
        return 1
    for document, text in new.items():
        if text == old[document]:
            print(f"{document}: tables are up to date")
            continue
        part = (_ROOT / document).with_suffix(".part")
        part.write_text(text)
        os.replace(part, _ROOT / document)
        print(f"{document}: tables regenerated")
    print(f"{_PICTURE}: drawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
