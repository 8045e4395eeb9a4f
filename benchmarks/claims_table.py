"""The README's table of a paper's claims, from the stored summary of a reproduction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks import markdown

REPRODUCTIONS = Path(__file__).resolve().parent.parent / "docs"


@dataclass(frozen=True)
class ClaimsTable:
    """The table `name`, one row per claim in the summary.json stored in `docs/<experiment>`."""

    name: str
    experiment: str

    def markdown(self, folder: Path = REPRODUCTIONS) -> str:
        """The whole table in Markdown. Raises FileNotFoundError where no summary is stored."""
        path = folder / self.experiment / "summary.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; run 'growkernels reproduce {self.experiment}' and copy its "
                "summary.json there"
            )
        claims = json.loads(path.read_text())["claims"]
        rows = []
        for claim in claims:
            verdicts: dict[str, list[str]] = {}
            for finding in claim["findings"]:
                setting = verdicts.setdefault(finding["verdict"] or "no test", [])
                if finding["setting"] not in setting:
                    setting.append(finding["setting"])
            settings = "; ".join(f"{key}: {', '.join(names)}" for key, names in verdicts.items())
            rows.append([claim["claim"], f"**{claim['verdict']}**", settings])
        return markdown.table(("claim of the paper", "verdict", "settings"), rows)


CLAIMS = tuple(ClaimsTable(f"claims {name}", name) for name in ("sensli", "scaling", "basis"))
