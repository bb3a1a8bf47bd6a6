"""The command line: one command for each stage. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from isd_repro import __version__
from isd_repro.errors import EXIT_INTERRUPTED, UserError

app = typer.Typer(
    name="isd-repro",
    help="Reproduce ISD (iterative similarity distillation): one command for each stage of the pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failure, 2 usage, 3 parameters, 4 data, 75 stopped and resumable, 130 interrupted.",
)

checkpoint = typer.Typer(help="Checkpoints of any origin: what is in them.", no_args_is_help=True)

ParamsFile = Annotated[Path, typer.Option("--params", "-p", help="A profile's parameters.")]
RunNames = Annotated[list[str], typer.Argument(help="Runs, as named in the parameters.")]
DEFAULT = Path("params.yaml")
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

    from isd_repro import config

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
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
