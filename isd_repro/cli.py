"""The command line: one command for each stage. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from isd_repro import __version__
from isd_repro.errors import EXIT_FAILURE, EXIT_INTERRUPTED, UserError

app = typer.Typer(
    name="isd-repro",
    help="Reproduce ISD (iterative similarity distillation): one command for each stage of the pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failure, 2 usage, 3 parameters, 4 data, 75 stopped and resumable, 130 interrupted.",
)

bench = typer.Typer(help="Measure, and compare with what others use.", no_args_is_help=True)
checkpoint = typer.Typer(help="Checkpoints of any origin: what is in them.", no_args_is_help=True)

ParamsFile = Annotated[Path, typer.Option("--params", "-p", help="A profile's parameters.")]
RunNames = Annotated[list[str], typer.Argument(help="Runs, as named in the parameters.")]
DEFAULT = Path("params.yaml")


class Protocol(StrEnum):
    """Which evaluations."""

    knn = "knn"
    linear = "linear"
    all = "all"


class Which(StrEnum):
    """Which encoders."""

    student = "student"
    teacher = "teacher"
    both = "both"


class Statistics(StrEnum):
    """Whose BatchNorm statistics."""

    own = "own"
    student = "student"


STAGES, RESULTS = "Stages, in the order of the pipeline", "Results"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def _stage(stage: str, names: list[str], file: Path) -> None:
    """Run one stage for each name, in one process."""
    from rich.console import Console

    from isd_repro import artifacts, config

    artifacts.remember_code()
    params, layout = config.load(file)
    console = Console(stderr=True, force_interactive=sys.stderr.isatty())
    function = getattr(import_module(f"isd_repro.stages.{stage}"), stage)
    for name in names:
        function(name, params, layout, console)


@app.command(rich_help_panel=STAGES)
def prepare(
    subsets: Annotated[list[str], typer.Argument(help="Subsets, as named in the parameters.")], params: ParamsFile = DEFAULT
) -> None:
    """Draw subsets from an image source and pack them: manifest and store."""
    _stage("prepare", subsets, params)


@app.command(rich_help_panel=STAGES)
def pretrain(runs: RunNames, params: ParamsFile = DEFAULT) -> None:
    """Train runs and export their encoders; started again, it resumes."""
    _stage("pretrain", runs, params)


@app.command(rich_help_panel=STAGES)
def extract(runs: RunNames, params: ParamsFile = DEFAULT) -> None:
    """Compute the features of the search and query images."""
    _stage("extract", runs, params)


@app.command(rich_help_panel=STAGES)
def knn(runs: RunNames, params: ParamsFile = DEFAULT) -> None:
    """Score runs by their nearest neighbours."""
    _stage("knn", runs, params)


@app.command(rich_help_panel=STAGES)
def linear(runs: RunNames, params: ParamsFile = DEFAULT) -> None:
    """Score runs by a linear classifier on the frozen encoder."""
    _stage("linear", runs, params)


@app.command(rich_help_panel=STAGES)
def report(params: ParamsFile = DEFAULT) -> None:
    """Render tables, figures and the page from the committed records."""
    from rich.console import Console

    from isd_repro import config
    from isd_repro.stages.report import report as render

    loaded, layout = config.load(params)
    render(loaded, layout, Console(stderr=True, force_interactive=sys.stderr.isatty()))


@app.command(rich_help_panel=RESULTS)
def show(params: ParamsFile = DEFAULT) -> None:
    """Print a profile's table from its records, and where its page is."""
    from isd_repro import config
    from isd_repro.stages.report import show as print_table

    loaded, layout = config.load(params)
    print_table(loaded, layout)


@app.command(rich_help_panel=RESULTS)
def check(files: Annotated[list[Path], typer.Argument(help="Parameter files.")]) -> None:
    """Check parameter files, each run's method included, without data and without training."""
    from isd_repro.stages.check import check as check_file

    for file in files:
        check_file(file)
        typer.echo(f"{file}: ok")


@app.command(rich_help_panel=RESULTS)
def evaluate(
    ckpt: Annotated[Path, typer.Option("--ckpt", help="A checkpoint of any known layout, ours or another project's.")],
    data: Annotated[
        Path | None, typer.Option(help="Images: train/<class>/* and val/<class>/*, or Tiny-ImageNet's folder or zip.")
    ] = None,
    prepared: Annotated[Path | None, typer.Option(help="Instead of --data: a prepared subset of the pipeline.")] = None,
    listed: Annotated[Path | None, typer.Option("--list", help="One of the authors' lists: its classes and groups.")] = None,
    protocol: Annotated[Protocol, typer.Option(help="Which numbers; linear says first how long it takes.")] = Protocol.knn,
    which: Annotated[Which, typer.Option(help="Which encoder of the file.")] = Which.student,
    arch: Annotated[str, typer.Option(help="Architecture, where it is not to be read from the shapes.")] = "auto",
    teacher_bn: Annotated[Statistics, typer.Option(help="BatchNorm statistics that the teacher runs with.")] = Statistics.own,
    image_size: Annotated[int | None, typer.Option(help="Side in pixels; default: the file's, else 224.")] = None,
    crop_ratio: Annotated[float | None, typer.Option(help="Size / resized short side; default: the file's, else 0.875.")] = None,
    mean: Annotated[str | None, typer.Option(help="By channel; default: the file's, else 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option(help="By channel; default: the file's, else 0.229,0.224,0.225.")] = None,
    k: Annotated[list[int], typer.Option("--k", help="Numbers of neighbours.")] = [1, 20],  # noqa: B006 - typer copies it
    linear_seeds: Annotated[int, typer.Option(help="Heads of the paper's protocol on one pass, to see their spread.")] = 1,
    linear_epochs: Annotated[int | None, typer.Option(help="Other than the paper's 40; the record names it.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that decode images; changes no number.")] = None,
    cache: Annotated[bool, typer.Option(help="Keep features in .state/features for the next evaluation.")] = True,
    per_class: Annotated[bool, typer.Option(help="Accuracy class by class, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a record; `report` shows records/<name>/external.json.")] = None,
    label: Annotated[str | None, typer.Option(help="The record's row in tables; default: its name.")] = None,
) -> None:
    """Score any checkpoint on labelled images as the paper does, without a pipeline."""
    from rich.console import Console

    from isd_repro.evals.request import Request, numbers
    from isd_repro.stages.evaluate import evaluate as run

    request = Request(
        ckpt=ckpt,
        data=data,
        prepared=prepared,
        listed=listed,
        protocol=protocol.value,
        which=which.value,
        arch=arch,
        teacher_bn=teacher_bn.value,
        image_size=image_size,
        crop_ratio=crop_ratio,
        mean=numbers("--mean", mean),
        std=numbers("--std", std),
        ks=tuple(k),
        seeds=linear_seeds,
        epochs=linear_epochs,
        cache=cache,
        workers=workers,
        label=label,
        out=out,
        per_class=per_class,
        as_json=as_json,
    )
    run(request, Console(stderr=True, force_interactive=sys.stderr.isatty()))


@bench.command(name="knn")
def bench_knn(
    bank: Annotated[int, typer.Option(help="Labelled vectors.")] = 100_000,
    dim: Annotated[int, typer.Option(help="Numbers of each.")] = 512,
    queries: Annotated[int, typer.Option(help="Vectors that are asked.")] = 1_000,
    k: Annotated[int, typer.Option("--k", help="Neighbours.")] = 20,
    n: Annotated[int, typer.Option("--n", help="Turns of each.")] = 5,
    threads: Annotated[int, typer.Option(help="Of both.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Exact search against faiss-cpu's exact index, in turns within one process."""
    import json

    from isd_repro.bench import knn as measure

    sizes = measure.Sizes(bank=bank, dim=dim, queries=queries, k=k, repeats=n, threads=threads)
    result = measure.bench(
        sizes, lambda turn, a, b: typer.echo(f"turn {turn + 1}: isd-repro {a:.3f} s, faiss {b:.3f} s", err=True)
    )
    typer.echo(json.dumps(result.as_json(), indent=1) if as_json else "\n".join(measure.lines(result)))


app.add_typer(bench, name="bench", rich_help_panel=RESULTS)


@checkpoint.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint: torch or safetensors, ours or another project's.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the account as JSON.")] = False,
) -> None:
    """List every tensor and what it is to an evaluation; exit code 4 where the file would not load."""
    from isd_repro.stages.inspect import inspect as account

    account(file, as_json=as_json)


app.add_typer(checkpoint, name="checkpoint", rich_help_panel=RESULTS)


def main() -> None:
    """Run the command; a `UserError` becomes one message on standard error and its exit code."""
    try:
        app()
    except UserError as error:
        typer.secho(f"error: {error.message}", fg=typer.colors.RED, err=True)
        if error.hint:
            typer.secho(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        typer.secho(f"error: {where}{error.strerror or error}", fg=typer.colors.RED, err=True)
        typer.secho("hint: look at free space and permissions; nothing half-written is left", err=True)
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
