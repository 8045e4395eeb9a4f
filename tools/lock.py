"""Pins and hashes of what the two environments install: `make lock`, read by `make setup LOCKED=1`.

Each file in locks/ serves all supported Pythons, on every kind of machine, and holds more than one
of them needs: pip takes it for constraints, installs nothing that is not in it, and checks hashes.
Of torch for this kind of machine it has one build, the one that pip takes here.
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
    take_local_build(LOCKS / "venv.txt", options.torch)
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
        *of_pip(), *(["-"] if requirements else []),
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        input="\n".join(requirements),
        text=True,
        check=True,
    )


def of_pip() -> list[str]:
    """The registry and the limits on versions that pip is configured with here, if any.

    Their addresses stay out of the files.
    """
    listed = subprocess.run([*PIP, "config", "list"], stdout=subprocess.PIPE, text=True, check=True)
    settings = dict(line.split("=", 1) for line in listed.stdout.splitlines())
    options = {"global.index-url": "--default-index", "global.constraint": "--constraint"}
    return [
        word
        for name, option in options.items()
        if name in settings
        for word in (option, settings[name].strip("'"))
    ]


def take_local_build(path: Path, requirement: str) -> None:
    """Puts the wheel that pip chooses here, which may be a build for CPUs beside the registry, in
    the place of the registry's for the same machine: of two that are allowed pip prefers the one
    whose hash its index states.
    """
    chosen = hash_of(requirement)
    text = path.read_text()
    if chosen not in text:
        registered = hash_of(requirement, "--constraint", str(path))
        path.write_text(text.replace(registered, chosen))


def hash_of(requirement: str, *options: str) -> str:
    """As a line of a lock, of the wheel that pip takes with these options."""
    with tempfile.TemporaryDirectory() as folder:
        download = ["download", "--quiet", "--no-deps", "--dest", folder, *options, requirement]
        subprocess.run([*PIP, *download], check=True)
        (wheel,) = Path(folder).iterdir()
        hashed = [*PIP, "hash", str(wheel)]
        printed = subprocess.run(hashed, stdout=subprocess.PIPE, text=True, check=True).stdout
    return printed.splitlines()[-1]


if __name__ == "__main__":
    raise SystemExit(main())
