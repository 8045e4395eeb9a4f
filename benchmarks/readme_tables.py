"""`python -m benchmarks.readme_tables`: regenerates the README's tables from stored results.

A table stands between the markers `<!-- table: NAME -->` and `<!-- end table -->`; NAME is the name
of a TABLE or of MEANS that a family declares, or of a reproduction's table of claims. Nothing is
measured here.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims_table import CLAIMS, ClaimsTable
from benchmarks.families import family_files, load_family
from benchmarks.results import RESULTS, stored
from benchmarks.table import MeansTable, Table

_README = Path(__file__).resolve().parent.parent / "README.md"
# Up to the next end marker, but never across the beginning of another table.
_BLOCK = re.compile(
    r"<!-- table: ([^>]+?) -->\n(?:(?!<!-- table: ).)*?<!-- end table -->", re.DOTALL
)


def regenerate(
    text: str, tables: Sequence[Table | MeansTable | ClaimsTable], results: Path = RESULTS
) -> str:
    """`text` with every table brought up to date.

    Raises ValueError where a table's marker is missing, incomplete or unknown, and
    FileNotFoundError where nothing is stored for its family.
    """
    by_name = {table.name: table for table in tables}
    marked = re.findall(r"<!-- table: ([^>]+?) -->", text)
    complete = [match.group(1) for match in _BLOCK.finditer(text)]
    for name in marked:
        if name not in by_name:
            raise ValueError(f"the README marks a table {name!r} that no benchmark family declares")
        if name not in complete:
            raise ValueError(f"the README's table {name!r} lacks its <!-- end table --> marker")
    for name in by_name:
        if name not in marked:
            raise ValueError(
                f"the README has no place for the table {name!r}; add the two lines "
                f"'<!-- table: {name} -->' and '<!-- end table -->' where it belongs"
            )
    return _BLOCK.sub(lambda match: _block(by_name[match.group(1)], results), text)


def _block(table: Table | MeansTable | ClaimsTable, results: Path) -> str:
    return f"<!-- table: {table.name} -->\n{_markdown(table, results)}\n<!-- end table -->"


def _markdown(table: Table | MeansTable | ClaimsTable, results: Path) -> str:
    if isinstance(table, ClaimsTable):
        return table.markdown()
    family = stored(table.family, results)
    if not family:
        raise FileNotFoundError(
            f"no results of {table.family!r} are stored in {results}; "
            f"run 'growkernels bench {table.family}' first"
        )
    return table.markdown(family)


def main() -> int:
    families = [load_family(path) for path in family_files().values()]
    means = [family.MEANS for family in families if hasattr(family, "MEANS")]
    tables = [*(family.TABLE for family in families), *means, *CLAIMS]
    try:
        old = _README.read_text()
        new = regenerate(old, tables)
    except (FileNotFoundError, ValueError) as error:
        print(f"readme-tables: {error}", file=sys.stderr)
        return 1
    if new == old:
        print(f"{_README.name}: tables are up to date")
        return 0
    part = _README.with_suffix(".part")
    part.write_text(new)
    os.replace(part, _README)
    print(f"{_README.name}: regenerated {', '.join(table.name for table in tables)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
