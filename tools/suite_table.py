"""The short table of a GPU suite's results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OURS = "growkernels"


def render(results: Mapping[str, Any]) -> str:
    """Steps, ceilings and one line per case, from the suite's JSON."""
    device = results["device"]
    lines = [
        f"{device['gpu'] or 'no GPU'}, torch {device['torch']}, CUDA {device['cuda']}, "
        f"{results['started']}"
    ]
    for step in results.get("plan", ()):
        settings = [f"{name}={value}" for name, value in step["environment"].items()]
        command = " ".join([*settings, *step["command"]])
        lines.append(f"would run {step['name']}: {command}{_notes(step['detail'])}")
    for step in results["steps"]:
        detail = step["detail"]
        ended = f"{step['name']:24} {step['status']:12} {step['seconds']:6.1f} s"
        lines.append(f"{ended}{_notes(detail)}")
        lines += [f"  FAILED {name}" for name in detail.get("failed tests", ())]
        lines += [f"  | {line}" for line in detail.get("last lines", ())]
    if ceilings := results.get("ceilings"):
        rates = [f"{name} {_rate(value, name == 'copy')}" for name, value in ceilings.items()]
        lines.append(f"ceilings: {', '.join(rates)}")
    for family, content in results["benchmarks"].items():
        lines += ["", f"{family}: {len(content['cases'])} cases"]
        lines += [_row(case) for case in content["cases"]]
    return "\n".join(lines)


def _notes(detail: Mapping[str, Any]) -> str:
    """Numbers and the reason in brackets."""
    notes = [f"{number} {what}" for what, number in detail.items() if isinstance(number, int)]
    notes += [detail["reason"]] if "reason" in detail else []
    return f" ({', '.join(notes)})" if notes else ""


def _row(case: Mapping[str, Any]) -> str:
    """A case against its fastest opponent."""
    summary = case["summary"]
    ours = summary[_OURS]
    microseconds = 1e6 * ours["seconds"]["median"]
    rate = _rate(1e9 * ours["giga_per_second"], case["ceiling_kind"] == "copy")
    share = ours["share_of_ceiling"]
    of_ceiling = f" {100 * share['median']:5.1f} %" if share else " " * 8
    theirs = {name: row["seconds"]["median"] for name, row in summary.items() if name != _OURS}
    against = ""
    if theirs:
        fastest = min(theirs, key=lambda name: theirs[name])
        speedup = summary[fastest]["speedup_of_ours"]["median"]
        against = f"  {speedup:6.2f}x {fastest}"
    return f"  {case['name']:44} {microseconds:10.1f} us {rate:>13}{of_ceiling}{against}"


def _rate(per_second: float, memory: bool) -> str:
    unit = "B/s" if memory else "FLOP/s"
    if per_second >= 1e12:
        return f"{per_second / 1e12:.3g} T{unit}"
    return f"{per_second / 1e9:.3g} G{unit}"
