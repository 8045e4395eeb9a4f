"""Asks for every https page that README and the documents link: `make links`.

Where no answer comes nothing is said of the page; an error that a server answers fails.
"""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *(ROOT / "docs").rglob("*.md")]
    linked: dict[str, list[str]] = {}
    for page in sorted(pages):
        for address in re.findall(r"https://[^\s<>()\[\]\"'`|]+", page.read_text()):
            linked.setdefault(address.rstrip(".,;:"), []).append(str(page.relative_to(ROOT)))
    wrong = 0
    for address, places in sorted(linked.items()):
        answer = ask(address)
        wrong += isinstance(answer, int) and answer >= 400
        print(f"{answer}: {address} in {', '.join(dict.fromkeys(places))}")
    return 1 if wrong else 0


def ask(address: str) -> int | str:
    """The status, or why none came."""
    # Some servers refuse programs that do not say what they are.
    request = urllib.request.Request(address, headers={"User-Agent": "growkernels-links/1"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, OSError) as error:
        return f"not reached ({getattr(error, 'reason', error)})"


if __name__ == "__main__":
    sys.exit(main())
