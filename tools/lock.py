"""Pins and hashes of what the two environments install: `make lock`, read by `make setup LOCKED=1`.

Each file in locks/ serves all supported Pythons, on every kind of machine, and holds more than one
of them needs: pip takes it for constraints, installs nothing that is not in it, and checks hashes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"
OLDEST_PYTHON = "3.10"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", required=True, help="of .venv, such as torch==2.13.0")
    parser.add_argument("--torch-cuda", required=True, help="of .venv-cuda")
    options = parser.parse_args()
    LOCKS.mkdir(exist_ok=True)
    lock("pip", ["pip"], [])
    lock("venv", [options.torch, *experiments()], ["dev", "wheel"])
    add_hash(LOCKS / "venv.txt", options.torch)
    # Apart: a torch that brings a Triton asks for another one.
    lock("triton", [], ["triton"])
    lock("venv-cuda", [options.torch_cuda, *experiments()], ["cuda"])
    return 0


def experiments() -> list[str]:
    """What the extra asks for. uv would have to build the package to know."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(project["optional-dependencies"]["experiments"])


def lock(name: str, requirements: list[str], groups: list[str]) -> None:
    command = [
        "-m", "uv", "pip", "compile", "--quiet", "--upgrade", "--universal", "--generate-hashes",
        "--python-version", OLDEST_PYTHON, "--no-annotate", "--no-header", "--output-file",
        str(LOCKS / f"{name}.txt"), *(f"--group={group}" for group in groups),
        *index(), *(["-"] if requirements else []),
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        input="\n".join(requirements),
        text=True,
        check=True,
    )


def index() -> list[str]:
    """The registry that pip is configured with, where it is not the usual one."""
    asked = [*PIP, "config", "get", "global.index-url"]
    found = subprocess.run(asked, capture_output=True, text=True)
    # Its address stays out of the file.
    return ["--default-index", found.stdout.strip()] if found.returncode == 0 else []


def add_hash(path: Path, requirement: str) -> None:
    """Adds the wheel that pip chooses here, which may be a build for CPUs beside a registry."""
    with tempfile.TemporaryDirectory() as folder:
        download = ["download", "--quiet", "--no-deps", "--dest", folder, requirement]
        subprocess.run([*PIP, *download], check=True)
        (wheel,) = Path(folder).iterdir()
        hashed = subprocess.run([*PIP, "hash", str(wheel)], capture_output=True, text=True)
    option = hashed.stdout.splitlines()[-1]
    text = path.read_text()
    if option not in text:
        line = f"{requirement} \\\n"
        if text.count(line) != 1:
            sys.exit(f"growkernels: {path} does not pin {requirement}; run `make lock` again")
        path.write_text(text.replace(line, f"{line}    {option} \\\n"))


if __name__ == "__main__":
    raise SystemExit(main())
