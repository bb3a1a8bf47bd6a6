"""`python -m benchmarks NAME|all`: measure speed and memory, and compare with what others use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def benchmarks(
    names: Annotated[list[str] | None, typer.Argument(help="Comparisons, or `all`; none lists them.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON files, figures and the table.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A variant to measure; may be repeated. Default: all.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A size, such as bank=65536; may be repeated.")] = None,
    toy: Annotated[bool, typer.Option("--toy", help="Small sizes, to see that everything runs.")] = False,
) -> None:
    """Measure variants against a baseline, in interleaved repetitions within one process."""
    from benchmarks import cases
    from isd_repro.runtime.errors import ConfigError

    if not names:
        for name, case in cases.cases().items():
            sizes = ", ".join(f"{key}={value}" for key, value in vars(case.sizes).items() if isinstance(value, int | float | str))
            typer.echo(f"{name:<18} {sizes}")
        return
    settings = dict(text.partition("=")[::2] for text in set_ or ())
    if bad := [name for name, value in settings.items() if not value]:
        raise ConfigError(f"--set {bad[0]}: no value", "write NAME=VALUE")
    cases.run(tuple(names), out=out, toy=toy, settings=settings, only=tuple(only or ()), say=_say, show=typer.echo)


def _say(line: str) -> None:
    typer.echo(line, err=True)


if __name__ == "__main__":
    from isd_repro.cli import main

    main(app)
