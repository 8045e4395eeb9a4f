"""Floor 5: the `growkernels` command. Every subcommand hands over to the floor it belongs to."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from growkernels import info as information
from growkernels.experiments.time_limit import TimeLimitError, time_limit
from growkernels.termination import Terminated, raised_on_sigterm

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
    help="Fast ops and drivers for neural networks that grow, or get compressed, while they train.",
)
reproduce = typer.Typer(no_args_is_help=True)
app.add_typer(reproduce, name="reproduce")

STOPPED = 3  # the exit status of a run that reached its time limit
INTERRUPTED = 130  # that of a run ended by Ctrl-C, as shells count

# The commands below parse their arguments themselves, `--help` included.
HAND_OVER = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("info")
def show_info(
    as_json: bool = typer.Option(False, "--json", help="The same as JSON, for programs."),
) -> None:
    """What was built, and which backend every op uses.

    Versions, CPU features, GPU kernels, and for every op, device and dtype the backend that runs
    and why the others do not.
    """
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
    """Measure the ops against their opponents."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        raise FileNotFoundError(
            f"the benchmarks are part of the source checkout and {checkout} is none; "
            "run `growkernels bench` from an environment made by `make setup`"
        )
    sys.path.insert(0, str(checkout))
    raise typer.Exit(importlib.import_module("benchmarks.__main__").main(context.args))


@app.command()
def grow(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="From torch.save: a model's state dict, or a dict with 'model' and, if there is "
            "one, 'optimizer' and 'insertions'."
        ),
    ],
    record: Annotated[
        Path, typer.Option(help="JSON of one record or several, from a driver's record().")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The grown checkpoint.")],
    build: Annotated[
        str,
        typer.Option(
            help="MODULE:FUNCTION that gives the model before any growth; found from this folder "
            "too."
        ),
    ],
) -> None:
    """Do to a checkpoint what a record of growth says, without a run.

    Parameters and optimizer states are those that the growth leaves in a live run.
    """
    from growkernels.growth.offline import grow_file

    module, _, function = build.partition(":")
    sys.path.insert(0, "")
    found = getattr(importlib.import_module(module), function, None) if function else None
    if not callable(found):
        raise ValueError(
            f"--build is {build!r}; give MODULE:FUNCTION, a function that gives the model without "
            "arguments."
        )
    grown = grow_file(checkpoint, record.read_text(), out, found)
    before, after = grown["parameters"]
    print(f"{out}: {before:,} numbers in the model's state before, {after:,} after")


Images = Annotated[
    Path | None,
    typer.Option(
        help="Folder of images: CIFAR-10's unpacked archive, or train/<class>/*.jpg and "
        "test/<class>/*.jpg (or .png). Without one, quick generates images."
    ),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Out = Annotated[Path, typer.Option(help="A new folder for the results.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --out, or start it there.")
]
Minutes = Annotated[
    float | None,
    typer.Option(help="Stop at a checkpoint after so long (exit status 3), to be resumed later."),
]
Runs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many runs of every variant, instead of the preset's number; more of them are "
        "added to a finished run with --resume.",
    ),
]
Together = Annotated[
    bool,
    typer.Option(
        "--ddp",
        help="Under torchrun: all processes train each network together, a part of every batch "
        "each; without it each process trains networks of its own.",
    ),
]


@reproduce.callback()
def papers(context: typer.Context) -> None:
    """Reproduce a paper's experiments.

    Each leaves report.html in --out, with what holds of the paper, curves and costs; beside it
    summary.json has the final numbers and metrics.jsonl the curves. The quick preset takes minutes
    on two cores, desk hours, for verdicts. A run may be stopped in any way and goes on with
    --resume. Under torchrun (torchrun --nproc-per-node 4 --no-python growkernels reproduce ...) all
    processes train, with the same numbers.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from growkernels.experiments import helpers

        if helpers.helped():
            raise typer.Exit
        if helpers.restarted():
            context.default_map = {
                name: {"resume": True} for name in ("sensli", "basis", "scaling")
            }


@contextlib.contextmanager
def resumable(minutes: float | None, ddp: bool) -> Iterator[None]:
    """Limits the time a run takes, and says how to continue after Ctrl-C or SIGTERM."""
    from growkernels.experiments.team import together

    try:
        with time_limit(minutes), together(ddp):
            yield
    except KeyboardInterrupt:
        print("growkernels: Interrupted; continue with --resume.", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except Terminated as terminated:
        terminated.advice = "continue with --resume."
        raise


@reproduce.command()
def sensli(
    preset: Annotated[
        str,
        typer.Option(
            help="quick, desk (hours on two cores), or paper: the size of the paper's runs."
        ),
    ] = "quick",
    net: Annotated[
        str,
        typer.Option(help="fc: fully connected networks on the spirals; cnn: CNNs on CIFAR-10."),
    ] = "fc",
    data: Annotated[
        Path | None,
        typer.Option(
            help="For cnn: folder of CIFAR-10, its unpacked archive, or train/<class>/*.jpg and "
            "test/<class>/*.jpg (or .png)."
        ),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            help="For cnn: plain (the SGD the authors' code runs) or momentum (what it names)."
        ),
    ] = "plain",
    device: Device = "cpu",
    out: Out = Path("runs/sensli"),
    resume: Resume = False,
    minutes: Minutes = None,
    ddp: Together = False,
) -> None:
    """Layers inserted where their gradient is largest (SensLI).

    One and three insertions, by several rules and at several times, against the small and the
    final network from scratch: loss and FLOPs (arXiv 2311.15995).
    """
    from growkernels.experiments.sensli import run

    if ddp and net == "fc":
        raise ValueError(
            "--ddp is for --net cnn; many networks of fc are trained in one pass, and processes "
            "share those out without it."
        )
    with resumable(minutes, ddp):
        run(preset, net, data, device, out, resume, optimizer)


@reproduce.command()
def basis(
    preset: Annotated[
        str,
        typer.Option(
            help="quick, desk (hours on two cores), or paper: the full network and training."
        ),
    ] = "quick",
    data: Images = None,
    autocast: Annotated[
        bool, typer.Option("--autocast", help="Train in bfloat16 where that is safe.")
    ] = False,
    device: Device = "cpu",
    out: Out = Path("runs/basis"),
    resume: Resume = False,
    minutes: Minutes = None,
    runs: Runs = None,
    ddp: Together = False,
) -> None:
    """Basis convolutions and the search for their layers.

    ResNet-18 with basis convolutions in all, in searched and in no layers: accuracy and time per
    step, and what the search costs (Layer-Specific Basis Search, arXiv 2408.06024).
    """
    from growkernels.experiments.basis import run

    with resumable(minutes, ddp):
        run(preset, data, device, out, resume, autocast, runs)


@reproduce.command()
def scaling(
    preset: Annotated[
        str,
        typer.Option(
            help="quick, desk (hours on two cores), or paper: DeiT-S and its recipe, for a GPU."
        ),
    ] = "quick",
    data: Images = None,
    device: Device = "cpu",
    out: Out = Path("runs/scaling"),
    resume: Resume = False,
    minutes: Minutes = None,
    runs: Runs = None,
    ddp: Together = False,
) -> None:
    """Neurons added where splitting matrices say so.

    A DeiT that grows, against homogeneous ones and other ways to choose neurons: accuracy,
    parameters and FLOPs (Beyond Uniform Scaling, arXiv 2402.12418).
    """
    from growkernels.experiments.scaling import run

    with resumable(minutes, ddp):
        run(preset, data, device, out, resume, runs)


def main() -> int:
    """Runs the command line; what a user got wrong is one sentence and a non-zero exit status."""
    try:
        with raised_on_sigterm():
            return int(app(standalone_mode=True) or 0)
    except Terminated as terminated:
        print(f"growkernels: Terminated; {terminated.advice}", file=sys.stderr)
        return terminated.code
    except TimeLimitError as error:
        print(f"growkernels: {error}", file=sys.stderr)
        return STOPPED
    except PermissionError as error:
        print(
            f"growkernels: No permission to use {error.filename}; allow it or give another path.",
            file=sys.stderr,
        )
        return 1
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"growkernels: {error}", file=sys.stderr)
        return 1
