"""One self-contained HTML page per run: templates filled with what a study concluded.

``report.html`` is the frame of every page; each study's prose and tables stand in a template of its
own, which extends it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from growkernels.experiments.claims import RULE
from growkernels.experiments.plots import Plot
from growkernels.experiments.statistics import MINIMUM_RUNS

VERDICTS = {
    "holds": ("holds", "✓ holds"),
    "does not hold": ("fails", "✗ does not hold"),
    "cannot be told": ("open", "? cannot be told"),
    "not enough runs": ("open", "not enough runs"),
    None: ("open", "no test"),
}


def render(
    page: str, summary: Mapping[str, Any], plots: Mapping[str, Plot], shown: Mapping[str, Any]
) -> str:
    """The page of a run from its summary; ``shown`` is what the template needs besides."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"pm": _pm, "plain": _plain, "picture": _picture, "span": _span}
    environment.globals |= {"verdicts": VERDICTS, "rule": RULE, "minimum_runs": MINIMUM_RUNS}
    return environment.get_template(page).render(summary=summary, plots=plots, **shown)


def _pm(values: Mapping[str, Any], quantity: str, digits: int = 2) -> str:
    """Mean ± standard error of a quantity, as summaries have them."""
    mean, sem = values[f"{quantity}_mean"], values[f"{quantity}_sem"]
    return "diverged" if mean is None or sem is None else f"{mean:.{digits}f} ± {sem:.{digits}f}"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def _span(values: list[int | None]) -> str:
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _picture(plot: Plot) -> Markup:
    data = base64.b64encode(plot.png).decode()
    caption = Markup.escape(plot.caption)
    return Markup(
        '<figure><img alt="{0}" src="data:image/png;base64,{1}">'
        "<figcaption>{0}</figcaption></figure>"
    ).format(caption, data)
