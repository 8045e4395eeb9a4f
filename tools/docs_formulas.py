"""A hook of mkdocs: formulas between dollar signs become MathML, which needs no script."""

from __future__ import annotations

import re
from typing import Any

import latex2mathml.converter

# Code is left as it is: blocks between fences, and spans between backticks.
_CODE_OR_FORMULA = re.compile(
    r"^```.*?^```|`[^`\n]+`|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$",
    re.DOTALL | re.MULTILINE,
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its formulas replaced."""

    def replaced(match: re.Match[str]) -> str:
        for display in ("block", "inline"):
            if formula := match[display]:
                return str(latex2mathml.converter.convert(formula.strip(), display=display))
        return match[0]

    return _CODE_OR_FORMULA.sub(replaced, markdown)
