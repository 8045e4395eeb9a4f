"""Tables of claims, from the stored summaries of reproductions and studies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import markdown

REPRODUCTIONS = Path(__file__).resolve().parent.parent / "docs"


@dataclass(frozen=True)
class ClaimsTable:
    """The table `name`, one row per claim in the summary.json of the folders below `docs`.

    A single run shows its verdict for every setting. Of several, on different data, only the
    verdicts stand side by side; the keys of `runs` head their columns.
    """

    name: str
    runs: Mapping[str, str]

    def markdown(self, folder: Path = REPRODUCTIONS) -> str:
        """The whole table in Markdown.

        Raises FileNotFoundError where no summary is stored, ValueError where the runs' claims
        differ.
        """
        claims = [_claims(folder / path / "summary.json") for path in self.runs.values()]
        if len({tuple(claim["claim"] for claim in run) for run in claims}) > 1:
            raise ValueError(
                f"the claims in {', '.join(self.runs.values())} differ; store the reproductions "
                "anew, with one version"
            )
        if len(claims) == 1:
            rows = [
                [claim["claim"], f"**{claim['verdict']}**", _settings(claim)] for claim in claims[0]
            ]
            return markdown.table(("claim of the paper", "verdict", "settings"), rows)
        rows = [
            [same[0]["claim"], *(f"**{claim['verdict']}**" for claim in same)]
            for same in zip(*claims, strict=True)
        ]
        return markdown.table(("claim of the paper", *self.runs), rows)


@dataclass(frozen=True)
class StudyTable:
    """What the variants of the study in a folder below `docs` came to, and its claims with it."""

    name: str
    folder: str

    def markdown(self, folder: Path = REPRODUCTIONS) -> str:
        """Both tables in Markdown; FileNotFoundError where no summary is stored."""
        path = folder / self.folder / "summary.json"
        claims = _claims(path)
        variants = json.loads(path.read_text())["variants"]
        return "\n\n".join(
            (
                markdown.table(
                    ("variant", "runs", "test loss", "grown behind blocks"),
                    [
                        [name, str(of["runs"]), of["test_loss"], _places(of["inserted_behind"])]
                        for name, of in variants.items()
                    ],
                ),
                markdown.table(
                    ("claim", "verdict", "measured"),
                    [[c["claim"], f"**{c['verdict']}**", c["measured"]] for c in claims],
                ),
            )
        )


def _places(runs: Sequence[Sequence[int]]) -> str:
    """Where the runs grew, every sequence of places once."""
    different = dict.fromkeys(", ".join(map(str, places)) for places in runs if places)
    return "; ".join(different) or "not grown"


def _claims(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; run 'growkernels reproduce' as CONTRIBUTING.md says and copy the "
            "summary.json there"
        )
    claims: list[dict[str, Any]] = json.loads(path.read_text())["claims"]
    return claims


def _settings(claim: Mapping[str, Any]) -> str:
    verdicts: dict[str, list[str]] = {}
    for finding in claim["findings"]:
        setting = verdicts.setdefault(finding["verdict"] or "no test", [])
        if finding["setting"] not in setting:
            setting.append(finding["setting"])
    return "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in verdicts.items())


# One for every study that is stored; their markers stand in docs/evidence.md.
CLAIMS: tuple[ClaimsTable | StudyTable, ...] = (StudyTable("character GPT", "character_gpt"),)
