"""The real libraries, where they are installed; networks and ranks are those of other tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "growth"), str(TESTS / "distributed")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

collect_ignore_glob = [
    f"test_{needs}*.py"
    for needs in ("lightning", "transformers", "accelerate")
    if importlib.util.find_spec(needs) is None
]
