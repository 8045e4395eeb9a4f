"""Floor 5: the `growkernels` command. Every subcommand hands over to the floor it belongs to."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

from growkernels import info as information
from growkernels.experiments.time_limit import TimeLimitError, time_limit

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise ImportError(
        f"growkernels: the command line needs {missing.name}; "
        "run `pip install 'growkernels[experiments]'`"
    ) from None

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fast ops and drivers for neural networks that grow while they train.",
)
reproduce = typer.Typer(no_args_is_help=True, help="Reproduce a paper's experiments.")
app.add_typer(reproduce, name="reproduce")

STOPPED = 3  # the exit status of a run that reached its time limit

# The commands below parse their arguments themselves, `--help` included.
HAND_OVER = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("info")
def show_info(
    as_json: bool = typer.Option(False, "--json", help="The same as JSON, for programs."),
) -> None:
    """Versions, what was built, GPU kernels, and every op's backend, each with reasons."""
    report = {
        "environment": information.environment(),
        "built": information.built(),
        "gpu_kernels": information.gpu_kernel_table(),
        "backends": information.backend_table(),
    }
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)


def print_report(report: dict[str, Any]) -> None:
    """Prints what `growkernels info` collected as tables."""
    # Into a file or a pipe: wide enough that no reason is broken into many lines.
    console = Console(markup=False, width=None if sys.stdout.isatty() else 120)
    for title in ("environment", "built"):
        table = Table("", "", title=title, title_justify="left", show_header=False)
        for key, value in report[title].items():
            text = ", ".join(value) if isinstance(value, list) else value
            table.add_row(key, "none" if text in (None, "") else str(text))
        console.print(table)
    columns = ("family", "language", "ops", "built", "usable here")
    table = Table(*columns, title="GPU kernels", title_justify="left", show_lines=True)
    for row in report["gpu_kernels"]:
        usable = "yes" if row["obstacle"] is None else f"no: {row['obstacle']}"
        table.add_row(row["family"], row["language"], "\n".join(row["ops"]), row["built"], usable)
    console.print(table)
    columns = ("op", "device", "dtype", "backend", "refused")
    table = Table(*columns, title="backends", title_justify="left", show_lines=True)
    # dtypes that fare alike share a row.
    dtypes_of: dict[tuple[str, str, str, str], list[str]] = {}
    for row in report["backends"]:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in row["refused"].items())
        outcome = (row["op"], row["device"], row["backend"] or "none", reasons)
        dtypes_of.setdefault(outcome, []).append(row["dtype"])
    for (op, device, backend, reasons), names in dtypes_of.items():
        table.add_row(op, device, "\n".join(names), backend, reasons)
    console.print(table)


@app.command(context_settings=HAND_OVER, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Run the benchmarks, all or those of the families named."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        raise FileNotFoundError(
            f"the benchmarks are part of the source checkout and {checkout} is none; "
            "run `growkernels bench` from an environment made by `make setup`"
        )
    sys.path.insert(0, str(checkout))
    raise typer.Exit(importlib.import_module("benchmarks.__main__").main(context.args))


Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --out, or start it there.")
]
Minutes = Annotated[
    float | None,
    typer.Option(help="Stop at a checkpoint after so long (exit status 3), to be resumed later."),
]


@reproduce.callback()
def papers() -> None:
    """Reproduce a paper's experiments."""


@reproduce.command()
def sensli(
    preset: Annotated[
        str, typer.Option(help="quick, or paper: the size of the paper's runs.")
    ] = "quick",
    net: Annotated[
        str,
        typer.Option(help="fc: fully connected networks on the spirals; cnn: CNNs on CIFAR-10."),
    ] = "fc",
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data set, for networks on images.")
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            help="For cnn: plain (the SGD the authors' code runs) or momentum (what it names)."
        ),
    ] = "plain",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="A new folder for the results.")] = Path("runs/sensli"),
    resume: Resume = False,
    minutes: Minutes = None,
) -> None:
    """Layer insertion by virtual-layer gradients (SensLI, arXiv 2311.15995)."""
    from growkernels.experiments.sensli import run

    with time_limit(minutes):
        run(preset, net, data, device, out, resume, optimizer)


@reproduce.command()
def basis(
    preset: Annotated[
        str, typer.Option(help="quick, or paper: the full network and training.")
    ] = "quick",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the data set; without one quick generates images."),
    ] = None,
    autocast: Annotated[
        bool, typer.Option("--autocast", help="Train in bfloat16 where that is safe.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="A new folder for the results.")] = Path("runs/basis"),
    resume: Resume = False,
    minutes: Minutes = None,
) -> None:
    """Basis convolutions and the layer search (arXiv 2408.06024)."""
    from growkernels.experiments.basis import run

    with time_limit(minutes):
        run(preset, data, device, out, resume, autocast)


@reproduce.command()
def scaling(
    preset: Annotated[
        str, typer.Option(help="quick, or paper: DeiT-S and DeiT's recipe, for one GPU.")
    ] = "quick",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the data set; without one quick generates images."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="A new folder for the results.")] = Path("runs/scaling"),
    resume: Resume = False,
    minutes: Minutes = None,
) -> None:
    """Growth where splitting matrices say so (Beyond Uniform Scaling, arXiv 2402.12418)."""
    from growkernels.experiments.scaling import run

    with time_limit(minutes):
        run(preset, data, device, out, resume)


def main() -> int:
    """Runs the command line; what a user got wrong is one sentence and a non-zero exit status."""
    try:
        return int(app(standalone_mode=True) or 0)
    except TimeLimitError as error:
        print(f"growkernels: {error}", file=sys.stderr)
        return STOPPED
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"growkernels: {error}", file=sys.stderr)
        return 1
