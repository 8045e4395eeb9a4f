"""One self-contained HTML page per run: text, tables and pictures in a single file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from growkernels.experiments.statistics import Claim

_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 2.2rem 1.4rem 5rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; border-bottom: 1px solid #ddd; }
p, li { max-width: 76ch; }
.summary { font-size: 1.1rem; }
table { border-collapse: collapse; margin: .8rem 0; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .32rem .7rem .32rem 0;
  border-bottom: 1px solid #e5e5e5; font-size: .9rem; }
th { border-bottom: 2px solid #888; }
td.claim { width: 27%; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.verdict { font-weight: 600; white-space: nowrap; }
.holds { color: #00664a; } .fails { color: #a33c00; } .open { color: #666; }
figure { margin: 1.2rem 0; } figure img { width: 100%; height: auto; }
figcaption { color: #444; font-size: .92rem; max-width: 80ch; }
code, pre { background: #f4f4f4; border-radius: 4px; padding: .1rem .3rem; }
pre { padding: .7rem; overflow-x: auto; }
.scroll { overflow-x: auto; }
@media (max-width: 640px) {
  figure { overflow-x: auto; } figure img { width: 720px; }
  .claims thead { display: none; }
  .claims tr, .claims td { display: block; width: auto; border: 0; }
  .claims td { padding: .1rem 0; } .claims td.claim { font-weight: 600; padding-top: .8rem; }
  .claims tr { border-bottom: 1px solid #e5e5e5; padding: .4rem 0; }
}
"""

_VERDICTS = {
    "holds": ("holds", "✓ holds"),
    "does not hold": ("fails", "✗ does not hold"),
    "cannot be told": ("open", "? cannot be told"),
    None: ("open", "no test"),
}


@dataclass
class Section:
    """A heading and the HTML below it, added piece by piece."""

    title: str
    parts: list[str] = field(default_factory=list)

    def text(self, paragraph: str) -> None:
        self.parts.append(f"<p>{escape(paragraph)}</p>")

    def points(self, items: Sequence[str]) -> None:
        self.parts.append("<ul>" + "".join(f"<li>{escape(i)}</li>" for i in items) + "</ul>")

    def code(self, text: str) -> None:
        self.parts.append(f"<pre>{escape(text)}</pre>")

    def picture(self, png: bytes, caption: str) -> None:
        data = base64.b64encode(png).decode()
        self.parts.append(
            f'<figure><img alt="{escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Cells that are not strings are numbers: set in columns and not wrapped."""
        header = "".join(f"<th>{escape(h)}</th>" for h in head)
        body = "".join("<tr>" + "".join(_cell(c) for c in row) + "</tr>" for row in rows)
        self.parts.append(
            f'<div class="scroll"><table><thead><tr>{header}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )


@dataclass(frozen=True)
class Figures:
    """A number, or a mean with its error, as it stands in a table."""

    text: str


@dataclass(frozen=True)
class Plot:
    """A picture and what it shows."""

    png: bytes
    caption: str


def pictures(drawn: Mapping[str, Plot]) -> Section:
    """The section of all plots, in their order."""
    section = Section("Pictures")
    for plot in drawn.values():
        section.picture(plot.png, plot.caption)
    return section


def differences(points: Sequence[str]) -> Section:
    """The section that owns up to every departure."""
    section = Section("Where this differs from the paper")
    section.points(points)
    return section


def run_again(command: str, ends_with: str, measured: str) -> Section:
    """The section with the command; `measured` names what the run's metrics.jsonl holds."""
    section = Section("Run it again")
    section.code(command)
    section.text(
        "Add --resume to continue a run that was stopped, as often as wished; it ends with "
        f"{ends_with}. {measured} are in metrics.jsonl, all final numbers in summary.json, the "
        "pictures in plots/."
    )
    return section


def _cell(value: object) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    text = value.text if isinstance(value, Figures) else str(value)
    return f'<td class="number">{escape(text)}</td>'


def _verdict(verdict: str | None) -> str:
    style, text = _VERDICTS[verdict]
    return f'<span class="verdict {style}">{text}</span>'


def _support(claim: Claim) -> str:
    verdicts = [f.verdict for f in claim.findings if f.verdict]
    return f"({sum(v == 'holds' for v in verdicts)} of {len(verdicts)})" if verdicts else ""


def claims_table(claims: Sequence[Claim]) -> str:
    """Claim of the paper, what each setting measured, and the verdicts."""
    rows = []
    for claim in claims:
        span = max(1, len(claim.findings))
        for number, finding in enumerate(claim.findings):
            shared = (
                f'<td class="claim" rowspan="{span}">{escape(claim.statement)}<br>'
                f"{_verdict(claim.verdict)} {_support(claim)}</td>"
                if number == 0
                else ""
            )
            rows.append(
                f"<tr>{shared}<td>{escape(finding.setting)}</td><td>{escape(finding.measured)}</td>"
                f"<td>{_verdict(finding.verdict)}</td></tr>"
            )
        if not claim.findings:
            rows.append(
                f"<tr><td>{escape(claim.statement)}<br>{_verdict(claim.verdict)}</td>"
                '<td colspan="3">not measured in this run</td></tr>'
            )
    return (
        '<table class="claims"><thead><tr><th>Claim of the paper</th><th>Setting</th>'
        "<th>What we measured (mean ± standard error)</th><th>Verdict</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def render(
    title: str,
    summary: str,
    claims: Sequence[Claim],
    rule: str,
    sections: Sequence[Section],
    environment: Mapping[str, Any],
) -> str:
    """The whole page. ``rule`` says how measurements become verdicts."""
    body = [f"<h1>{escape(title)}</h1>", f'<p class="summary">{escape(summary)}</p>']
    body += ["<h2>Claims</h2>", f"<p>{escape(rule)}</p>", claims_table(claims)]
    for section in sections:
        body += [f"<h2>{escape(section.title)}</h2>", *section.parts]
    machine = Section("Environment")
    machine.table(["", ""], [[str(k), _plain(v)] for k, v in environment.items()])
    body += ["<h2>Environment</h2>", *machine.parts]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
