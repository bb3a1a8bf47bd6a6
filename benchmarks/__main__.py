"""`python -m benchmarks`: measure, and compare with what others use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from benchmarks.tracking import Arm
    from benchmarks.turns import Comparison

Threads = Annotated[int, typer.Option(help="Of all arms.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(
    help="Measure, and compare with what others use.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.command(name="knn")
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

    from benchmarks import knn as measure

    sizes = measure.Sizes(bank=bank, dim=dim, queries=queries, k=k, repeats=n, threads=threads)
    result = measure.bench(
        sizes, lambda turn, a, b: typer.echo(f"turn {turn + 1}: isd-repro {a:.3f} s, faiss {b:.3f} s", err=True)
    )
    typer.echo(json.dumps(result.as_json(), indent=1) if as_json else "\n".join(measure.lines(result)))


@app.command(name="loader")
def bench_loader(
    images: Annotated[int, typer.Option(help="Images that are made and read.")] = 256,
    batch: Annotated[int, typer.Option(help="Images of a batch.")] = 64,
    n: Annotated[int, typer.Option("--n", help="Turns of each.")] = 7,
    threads: Annotated[int, typer.Option(help="That decode.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The loader against a plain PIL ImageFolder pipeline, in turns within one process."""
    import json

    from benchmarks import loader as measure

    def say(turn: int, cpu: dict[measure.Arm, float]) -> None:
        typer.echo(f"turn {turn + 1}: " + ", ".join(f"{arm} {1000 * value:.2f} ms" for arm, value in cpu.items()), err=True)

    result = measure.bench(measure.Sizes(images=images, batch=batch, repeats=n, threads=threads), say)
    typer.echo(json.dumps(result.as_json(), indent=1) if as_json else "\n".join(measure.lines(result)))


@app.command(name="tracking")
def bench_tracking(
    n: Annotated[int, typer.Option("--n", help="Turns of each.")] = 9,
    steps: Annotated[int, typer.Option(help="Steps of an epoch.")] = 80,
    epochs: Annotated[int, typer.Option(help="Epochs of a turn.")] = 2,
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Speed of a training loop with tracking on, off and absent, in turns within one process."""
    import json

    from benchmarks import tracking as measure

    sizes = measure.Sizes(batch=batch, bank=16 * batch, steps=steps, epochs=epochs, repeats=n)

    def say(turn: int, speed: dict[Arm, float]) -> None:
        typer.echo(f"turn {turn + 1}: " + ", ".join(f"{arm} {value:.1f} images/s" for arm, value in speed.items()), err=True)

    result = measure.bench(sizes, say)
    typer.echo(json.dumps(result.as_json(), indent=1) if as_json else "\n".join(measure.lines(result)))


@app.command(name="loss")
def bench_loss(
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 256,
    bank: Annotated[int, typer.Option(help="Rows of the bank.")] = 128_000,
    dim: Annotated[int, typer.Option(help="Numbers of each.")] = 128,
    method: Annotated[str, typer.Option(help="isd or moco.")] = "isd",
    n: Annotated[int, typer.Option("--n", help="Turns of each.")] = 5,
    threads: Threads = 1,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, too, in processes of their own.")] = True,
    as_json: AsJson = False,
) -> None:
    """The loss of ISD or MoCo and its gradient on a large bank, the plain formula and ours in turns."""
    from benchmarks import loss as measure

    tau = {"tau_student": 0.2} if method == "moco" else {}
    sizes = measure.sizes_of(batch=batch, bank=bank, dim=dim, method=method, repeats=n, threads=threads, **tau)
    _tell(measure.bench(sizes, memory=memory, say=_say), as_json=as_json)


@app.command(name="views")
def bench_views(
    batch: Annotated[int, typer.Option(help="Images.")] = 256,
    side: Annotated[int, typer.Option(help="Of image and view, in pixels.")] = 32,
    n: Annotated[int, typer.Option("--n", help="Turns of each.")] = 7,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Both views of a batch, PIL images one at a time and ours as a batch, in turns."""
    from benchmarks import views as measure

    _tell(measure.bench(measure.Sizes(batch=batch, side=side, repeats=n, threads=threads), say=_say), as_json=as_json)


@app.command(name="step")
def bench_step(
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 256,
    side: Annotated[int, typer.Option(help="Of image and view, in pixels.")] = 32,
    bank: Annotated[int, typer.Option(help="Rows of the bank.")] = 128_000,
    arch: Annotated[str, typer.Option(help="resnet18, resnet50 or resnet-narrow.")] = "resnet18",
    stem: Annotated[str, typer.Option(help="imagenet or small.")] = "imagenet",
    width: Annotated[int, typer.Option(help="Of resnet-narrow.")] = 64,
    steps: Annotated[int, typer.Option(help="Of a turn.")] = 2,
    n: Annotated[int, typer.Option("--n", help="Turns of each.")] = 3,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Whole ISD steps by the plain recipe and by both engines, in turns."""
    from benchmarks import step as measure

    shape: dict[str, int | str] = {"batch": batch, "side": side, "bank": bank, "arch": arch, "stem": stem, "width": width}
    sizes = measure.sizes_of(**shape, steps=steps, repeats=n, threads=threads)
    _tell(measure.bench(sizes, say=_say), as_json=as_json)


@app.command(name="linear")
def bench_linear(
    images: Annotated[int, typer.Option(help="Of the epoch.")] = 512,
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 256,
    side: Annotated[int, typer.Option(help="Of a view, in pixels.")] = 64,
    settings: Annotated[int, typer.Option(help="Rates times weight decays, 50 at most.")] = 50,
    arch: Annotated[str, typer.Option(help="resnet18 or resnet-narrow.")] = "resnet18",
    width: Annotated[int, typer.Option(help="Of resnet-narrow.")] = 64,
    n: Annotated[int, typer.Option("--n", help="Turns of each.")] = 5,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Many settings of the linear protocol on one pass of the backbone, and one alone, in turns."""
    from benchmarks import linear as measure

    numbers = {"images": images, "batch": batch, "side": side, "settings": settings, "repeats": n, "threads": threads}
    _tell(measure.bench(measure.sizes_of(arch=arch, width=width, **numbers), say=_say), as_json=as_json)


@app.command(name="all")
def bench_all(
    names: Annotated[list[str] | None, typer.Argument(help="Comparisons by the names of their files; none means all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON files.")] = Path("reports/bench"),
    n: Annotated[int, typer.Option("--n", min=1, help="Turns of each.")] = 5,
) -> None:
    """Every comparison at the sizes of docs/performance.md, one JSON file each."""
    from benchmarks import every

    every.bench(out, n, tuple(names or ()), _say)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _tell(result: Comparison, *, as_json: bool) -> None:
    import json

    from benchmarks import turns
    from isd_repro.runtime.errors import UserError

    typer.echo(json.dumps(result.as_json(), indent=1, allow_nan=False) if as_json else "\n".join(turns.lines(result)))
    if result.wrong:
        raise UserError(f"arms that should compute the same do not: {', '.join(result.wrong)}", "the ratios are worth nothing")


if __name__ == "__main__":
    from isd_repro.cli import main

    main(app)
