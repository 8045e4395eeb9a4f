"""`python -m benchmarks [FAMILY ...] [--quick] [--device DEVICE]`: run families, store results."""

from __future__ import annotations

import argparse
import sys

import pytest

from benchmarks.families import family_files


def main(arguments: list[str] | None = None) -> int:
    files = family_files()
    parser = argparse.ArgumentParser(prog="growkernels bench", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(files)}")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing is stored")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.families if name not in files]
    if unknown:
        print(
            f"growkernels bench: there is no family {unknown[0]!r}; known are {', '.join(files)}",
            file=sys.stderr,
        )
        return 2
    chosen = [str(files[name]) for name in options.families or files]
    flags = ["--benchmark-only", "-v", f"--device={options.device}"]
    return int(pytest.main([*chosen, *flags, *(["--quick"] if options.quick else [])]))


if __name__ == "__main__":
    sys.exit(main())
