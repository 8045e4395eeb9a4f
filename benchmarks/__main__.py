"""`python -m benchmarks [FAMILY ...] [--device DEVICE]`: run families, store their results."""

from __future__ import annotations

import argparse
import sys

import pytest

from benchmarks.families import cases_on, family_files, load_family
from growkernels.ops.gpu_support import no_gpu


def main(arguments: list[str] | None = None) -> int:
    files = family_files()
    parser = argparse.ArgumentParser(prog="growkernels bench", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(files)}")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing is stored")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu by default")
    parser.add_argument("--list", action="store_true", help="name the cases, run nothing")
    parser.add_argument("--results", help="folder to store every case in as soon as it has run")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.families if name not in files]
    if unknown:
        print(
            f"growkernels bench: there is no family {unknown[0]!r}; known are {', '.join(files)}",
            file=sys.stderr,
        )
        return 2
    chosen = options.families or list(files)
    cases = {name: cases_on(options.device, load_family(files[name])) for name in chosen}
    if options.list:
        for name, declared in cases.items():
            for case in declared:
                print(f"{name}: {case.name} ({case.shape}; against {', '.join(case.opponents)})")
        return 0
    if not any(cases.values()):
        print(
            f"growkernels bench: {', '.join(chosen)} has no cases for {options.device}; "
            "choose another family or --device",
            file=sys.stderr,
        )
        return 2
    if options.device == "cuda" and (reason := no_gpu()):
        print(
            f"growkernels bench: --device cuda cannot be used here: {reason}; choose cpu, or "
            "--list to name the cases",
            file=sys.stderr,
        )
        return 2
    flags = ["--benchmark-only", "-v", f"--device={options.device}"]
    flags += ["--quick"] if options.quick else []
    flags += [f"--results={options.results}"] if options.results else []
    return int(pytest.main([*(str(files[name]) for name in chosen if cases[name]), *flags]))


if __name__ == "__main__":
    sys.exit(main())
