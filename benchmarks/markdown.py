"""Tables as Markdown that say nothing twice."""

from __future__ import annotations

from collections.abc import Sequence


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], common: Sequence[str] = ()) -> str:
    """The table, a cell left empty where it and all to its left repeat the row above.

    Those of the columns `common` that say the same in every row are left out and said once, in a
    line above.
    """
    said_once = [
        column
        for column, name in enumerate(heading)
        if name in common and len({row[column] for row in rows}) == 1
    ]
    kept = [column for column in range(len(heading)) if column not in said_once]
    lines = [[heading[column] for column in kept], ["---"] * len(kept)]
    above: list[str] = []
    for row in rows:
        cells = [row[column] for column in kept]
        repeated = 0
        while repeated < len(above) and cells[repeated] == above[repeated]:
            repeated += 1
        lines.append([""] * repeated + cells[repeated:] if repeated < len(cells) else cells)
        above = cells
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if not said_once:
        return text
    facts = "; ".join(f"{heading[column]}: {rows[0][column]}" for column in said_once)
    return f"{facts[0].upper()}{facts[1:]}.\n\n{text}"
