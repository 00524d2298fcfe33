"""Command line: ``compaware demo | info | compress | study``, also ``python -m compaware_kernels``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ._utils.tables import text_table
from ._utils.version import __version__
from .compression import command
from .environment import info as gather_info
from .ops import quarantine
from .study import Stopped

__all__ = ["app", "main"]

app = typer.Typer(
    help="Compression-aware training: networks become low-rank during training, and are then factorized.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
console = Console(stderr=True)


def main() -> None:
    """Run the command line. Exit codes: 0 success, 1 failure (one line on stderr says why), 2 wrong usage."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, Stopped) as error:
        text = " ".join(str(error).split())
        print(f"compaware: error: {text or type(error).__name__}", file=sys.stderr)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"compaware {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True,
                                          help="Print the version.")] = False,
) -> None:  # fmt: skip
    pass


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="Folder of IDX files (MNIST, Fashion-MNIST), gzipped or not. "
                                                   "Default: scikit-learn's digits.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report, the results and the models.")] = Path("out/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Networks trained per arm.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training.")] = 30,
    tune_epochs: Annotated[int, typer.Option(min=0, help="Epochs of fine-tuning after compression; 0: none.")] = 3,
    nuclear: Annotated[float, typer.Option(min=0, help="Strength of the nuclear norm (low rank).")] = 2.0,
    group: Annotated[float, typer.Option(min=0, help="Strength of the group lasso (neurons become 0).")] = 0.05,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; for the small digits one is fastest.")] = 1,
) -> None:  # fmt: skip
    """Train a small convolutional network with and without the penalties, compress both, and compare.

    Prints a table, and writes an HTML report with curves of accuracy against size, the results and the networks.
    """
    from .demo import command as demo_command

    torch.set_num_threads(threads)
    settings = demo_command.settings(data, seeds, epochs, tune_epochs, nuclear, group)
    demo_command.run(settings, out, _progress)


@app.command()
def study(
    config: Annotated[str, typer.Argument(help="Name of a study in the package, or a TOML file.")] = "digits",
    data: Annotated[str | None, typer.Option(help="Other data: digits, or a folder of IDX files or images.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for all results. Default: out/study/CONFIG.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Number of parallel trainings. Default: one per GPU, "
                                                  "else one per core.")] = None,
) -> None:  # fmt: skip
    """Measure accuracy against compression, for this method and for others.

    Trains every method at every strength and seed, compresses all networks alike, fine-tunes and evaluates them. When
    it was interrupted or killed, running it again continues it. Writes a table, results as JSON and an HTML report.
    """
    from .study import command as study_command

    study_command.run(config, data, out, processes, _progress)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    selftest: Annotated[bool, typer.Option("--selftest", help="Compare every kernel with fp64 on each GPU of this "
                                           "machine. A kernel that fails is not used any more, and the exit code is 1. "
                                           "The first run takes minutes, because Triton compiles.")] = False,
) -> None:  # fmt: skip
    """Print which backend runs each op on this machine, and why."""
    if selftest:
        raise typer.Exit(_selftest())
    facts = gather_info() | {"self-test": quarantine.about()}
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    keys = list(next(iter(facts["ops"].values())))
    rows = [(f"compaware::{op}", *(where[key] for key in keys)) for op, where in facts["ops"].items()]
    for name, value in facts.items():
        if name != "ops":
            print(f"{name}: {'; '.join(f'{k}: {v}' for k, v in value.items()) if isinstance(value, dict) else value}")
    print()
    print(text_table(("op", *keys), rows))


def _selftest() -> int:
    """Run the self-test on one GPU of each model, print its table, and return the exit code."""
    from . import selftest

    if not torch.cuda.is_available():
        print("nothing to test: torch sees no CUDA device")
    failed = False
    for name, device in {torch.cuda.get_device_name(i): i for i in range(torch.cuda.device_count())}.items():
        rows = selftest.run(device)
        failed |= any(row.failed for row in rows)
        print(f"{name}, cuda:{device}\n")
        print(text_table(("kernels", "case", "", "error / bound", "ms"), selftest.table(rows), right=(3, 4)))
        print(f"\nKept in {selftest.record(torch.device('cuda', device), rows)}")
    return int(failed)


@app.command()
def compress(
    weights: Annotated[Path, typer.Argument(help="Trained weights: a .safetensors file, or a torch state dict (.pt).")],
    model: Annotated[str, typer.Option(help="How to build the dense network: MODULE:FUNCTION. The module is imported, "
                                            "so it runs: name only code you trust.")],
    input: Annotated[str, typer.Option(help="Shape of one input, for example 1,3,224,224.")],
    out: Annotated[Path, typer.Option(help="File for the compressed model (.safetensors); its folder is made.")],
    rank: Annotated[str, typer.Option(help="Rank rule: energy:0.99, nuclear:0.9, threshold:1e-3, relative:0.05, "
                                           "fixed:16, share:0.25.")] = "energy:0.99",
    fold: Annotated[str, typer.Option(help="Convolutions as matrices: paper, spatial, input or auto.")] = "paper",
    goal: Annotated[str, typer.Option(help="speed: factorize only layers that get faster on this machine; size: "
                                           "all that get smaller.")] = "speed",
    measure: Annotated[bool, typer.Option(help="Measure layers on this machine instead of predicting.")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="Name pattern of layers to leave alone (repeatable).")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write the report as JSON.")] = None,
    key: Annotated[str | None, typer.Option(help="Where in the file the state dict is: model, or ema.module. "
                                            "Default: the first that fits.")] = None,
    model_args: Annotated[str, typer.Option(help="Arguments of FUNCTION, as Python literals: 10, width=0.5.")] = "",
) -> None:  # fmt: skip
    """Factorize the low-rank layers of a trained network, remove its dead neurons, and save the result.

    Weights are read without executing code. They may be nested ({"state_dict": ...}), and names may have prefixes
    (module., _orig_mod.). Load the result with ck.load(OUT, dense_model).
    """
    if not all(model.partition(":")[::2]):
        raise typer.BadParameter(
            f"wanted MODULE:FUNCTION, for example torchvision.models:resnet18; got {model!r}", param_hint="--model"
        )
    command.run(weights, model, _shape(input), out, rank=rank, fold=fold, goal=goal, measure=measure, skip=skip or (),
                report=report, key=key, model_args=model_args)  # fmt: skip


def _shape(text: str) -> tuple[int, ...]:
    """Shape from comma-separated sizes, "1,3,224,224" -> (1, 3, 224, 224)."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise typer.BadParameter(
            f"wanted whole numbers >= 1 separated by commas, 1,3,224,224; got {text!r}", param_hint="--input"
        )
    return shape


def _progress() -> Progress:
    """Progress bar on stderr: description, finished of all units, time spent and left."""
    return Progress(TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                    TextColumn("left"), TimeRemainingColumn(), console=console)  # fmt: skip
