"""Times ours of one tree on request: `python against_worker.py TREE DEVICE`, see against.py.

Uses that tree's `benchmarks` and `growkernels`, so of this checkout's no other file: it must run
with the commits of long ago. A request is a JSON list on a line, and so is its answer.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(tree: str, device_name: str) -> None:
    sys.path.insert(0, tree)
    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing else may come between the answers
    import time

    import torch

    from benchmarks.case import OURS
    from benchmarks.families import cases_on, family_files, load_family

    device = torch.device(device_name)
    call: Any = None

    def cases(family: str) -> dict[str, Any]:
        file = family_files().get(family)
        if file is None:
            return {}
        return {case.name: case for case in cases_on(device.type, load_family(file))}

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for line in sys.stdin:
        request, *words = json.loads(line)
        answer: Any = None
        if request == "cases":
            answer = list(cases(words[0]))
        elif request == "prepare":
            call = cases(words[0])[words[1]].prepare(device).calls[OURS]
            for _ in range(2):
                call()
        elif request == "time":
            wait()
            start = time.perf_counter()
            for _ in range(words[0]):
                call()
            wait()
            answer = time.perf_counter() - start
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
