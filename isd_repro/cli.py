"""The command line. Every command imports what it needs when it runs, so that `--help` is fast."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Never

import typer

from isd_repro import __version__, evaluations
from isd_repro.runtime import launcher, signals, streams
from isd_repro.runtime.errors import EXIT_FAILURE, EXIT_INTERRUPTED, Preempted, UserError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from isd_repro.config.layout import Layout
    from isd_repro.config.params import Params
    from isd_repro.runtime.dvc_lock import DvcLock

app = typer.Typer(
    name="isd-repro",
    help="Reproduce ISD (iterative similarity distillation): one command for each stage of the pipeline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failure, 2 usage, 3 parameters, 4 data, 75 stopped and resumable, 130 interrupted.",
)
STAGES, RESULTS = "Stages, in the order of the pipeline", "Results"


def _group(name: str, help_: str) -> typer.Typer:
    group = typer.Typer(help=help_, no_args_is_help=True)
    app.add_typer(group, name=name, rich_help_panel=RESULTS)
    return group


data = _group("data", "Inspect data sets and lists of unbalanced subsets.")
wandb = _group("wandb", "Publish runs to Weights & Biases and build its dashboard.")
paper = _group("paper", "Check the numbers that the paper publishes.")
run = _group("run", "Import, rename and remove runs of a profile.")
checkpoint = _group("checkpoint", "Inspect checkpoints of this and other projects.")

ParamsFile = Annotated[Path, typer.Option("--params", "-p", help="The params.yaml of a profile, or its folder.")]
SubsetNames = Annotated[list[str], typer.Argument(help="Names of subsets in params.yaml.")]
RunNames = Annotated[list[str], typer.Argument(help="Names of runs in params.yaml.")]
Anonymous = Annotated[bool, typer.Option("--anonymous", help="Remove host, user, paths, commit, git remote and e-mail.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON on standard output.")]
DEFAULT = Path("params.yaml")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def _console() -> Console:
    """The console for progress and warnings."""
    from rich.console import Console

    return Console(stderr=True, force_interactive=sys.stderr.isatty())


def _profile(file: Path) -> tuple[Params, Layout, Console]:
    """Parameters, layout and console of a profile. If DVC started this process, `dvc.lock` is copied first."""
    from isd_repro.config import reader

    params, layout = reader.load(file)
    if (stage := os.environ.get("DVC_STAGE")) and launcher.rank() == 0:
        _dvc_lock(params, layout).keep(stage.rpartition(":")[2])
    return params, layout, _console()


def _dvc_lock(params: Params, layout: Layout) -> DvcLock:
    from isd_repro import provenance
    from isd_repro.runtime.dvc_lock import DvcLock
    from isd_repro.runtime.files import sha256_file

    runs_with = f"{sha256_file(layout.file)} {provenance.source_hash()}"
    copy = layout.state("dvc") / f"{layout.profile}.lock"
    return DvcLock(layout.folder / "dvc.lock", copy, runs_with, {*params.subsets, *params.runs})


# --- stages -------------------------------------------------------------------------------------------------------------


def _function(stage: str) -> Callable[..., None]:
    """The function that runs a stage for one run."""
    homes = {"prepare": "data.prepare", "pretrain": "train.pretrain", "extract": "evaluations.stage"}
    if stage in homes:
        module = import_module(f"isd_repro.{homes[stage]}")
        found: Callable[..., None] = getattr(module, stage)
        return found
    from isd_repro.evaluations.stage import run_evaluation

    return partial(run_evaluation, stage)


def _stage(stage: str, names: list[str], file: Path, **options: int | None) -> None:
    """Run one stage for each name, in this process or as one of several ranks."""
    with ExitStack() as stack:
        # before anything is imported: a scheduler that stops the run while it starts is to see that the command can be repeated
        stop = stack.enter_context(signals.stop_on_signal()) if stage == "pretrain" else None
        code = launcher.start(stage, sys.argv[1:])
        if code is not None:
            raise typer.Exit(code)
        from isd_repro import provenance

        provenance.remember_code()
        params, layout, console = _profile(file)
        if complaint := provenance.git_complaint():
            console.print(f"warning: records will not name a commit: {complaint}", highlight=False, markup=False, soft_wrap=True)
        if stage != "prepare":  # on every rank, so that all of them stop
            _check_sources(names, params, layout)
        agreed: Callable[[bool], bool] = bool
        if launcher.ranks() > 1:
            from isd_repro.runtime import ranks

            stack.enter_context(ranks.joined())
            agreed = ranks.anywhere
            console.quiet = launcher.rank() > 0
        function = _function(stage)
        for name in names:
            if stop is not None and agreed(stop()):  # the signal came when the run before had nothing left to save
                raise Preempted(
                    f"{stop.reason or 'a signal to another rank'}: stopped before {name}",
                    "run the same command for the remaining runs",
                )
            function(name, params, layout, console, **options)


def _check_sources(runs: list[str], params: Params, layout: Layout) -> None:
    """Raise `DataError` if an environment variable names other images than those from which the runs' subsets were prepared."""
    from isd_repro.config.reader import find_run
    from isd_repro.data.source_check import check_source

    for subset in {find_run(params, run).data.subset: None for run in runs}:
        check_source(subset, params.subsets[subset], layout.prepared(subset), layout.verified)


@app.command(rich_help_panel=STAGES)
def prepare(
    subsets: SubsetNames,
    params: ParamsFile = DEFAULT,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode and encode images; default: one per core.")
    ] = None,
) -> None:
    """Draw subsets from an image source, pack their images and write manifests. An interrupted external pack is continued."""
    _stage("prepare", subsets, params, threads=threads)


@app.command(rich_help_panel=STAGES)
def pretrain(runs: RunNames, params: ParamsFile = DEFAULT) -> None:
    """Train runs and export their encoders. An interrupted run resumes when the command is repeated."""
    _stage("pretrain", runs, params)


@app.command(rich_help_panel=STAGES)
def extract(runs: RunNames, params: ParamsFile = DEFAULT) -> None:
    """Compute the features of the training (search) and test (query) images."""
    _stage("extract", runs, params)


def _evaluation(kind: str) -> None:
    """The command of one evaluation; its help is the first line of the evaluation's file."""

    def command(runs: RunNames, params: ParamsFile = DEFAULT) -> None:
        _stage(kind, runs, params)

    app.command(kind.replace("_", "-"), rich_help_panel=STAGES, help=evaluations.description(kind))(command)


for _each in evaluations.names():
    _evaluation(_each)


@app.command(rich_help_panel=STAGES)
def report(params: ParamsFile = DEFAULT) -> None:
    """Render the tables, the figures and the HTML page from the committed records."""
    from isd_repro.report.output import report as render

    render(*_profile(params))


# --- results ------------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=RESULTS)
def show(
    params: ParamsFile = DEFAULT,
    metric: Annotated[str, typer.Option(help="The score to show, such as 20-NN; by default the first.")] = "",
    wide: Annotated[bool, typer.Option("--wide", help="Print every main table with all scores and one row per seed.")] = False,
) -> None:
    """Print a profile's result, its main table and the address of its HTML page."""
    from isd_repro.report.output import show as print_table

    print_table(*_profile(params)[:2], metric=metric, wide=wide)


@app.command(rich_help_panel=RESULTS)
def verify(
    params: ParamsFile = DEFAULT,
    run: Annotated[list[str] | None, typer.Option(help="Check only this run; can be repeated.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Check records and rendered files only, without images or encoders.")
    ] = False,
    linear: Annotated[
        bool,
        typer.Option("--linear", help="Also retrain the linear, few-label and transfer classifiers; prints a time estimate."),
    ] = False,
    snapshots: Annotated[bool, typer.Option("--snapshots", help="Also evaluate the encoders saved during training.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check every number of a report against its records and files; exit with code 4 if any differs."""
    from isd_repro.verify import VerifyOptions
    from isd_repro.verify import verify as check_numbers

    loaded, layout, console = _profile(params)
    options = VerifyOptions(runs=tuple(run or ()), quick=quick, linear=linear, snapshots=snapshots, as_json=as_json)
    check_numbers(loaded, layout, options, console)


@app.command(rich_help_panel=RESULTS)
def compare(
    other: Annotated[
        str, typer.Argument(metavar="[REV | FOLDER]", help="A commit, a checkout, or a folder of reports.")
    ] = "HEAD",
    params: ParamsFile = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Compare a profile's numbers with those of another commit or machine; exit with code 4 if they do not agree."""
    from isd_repro.compare import compare as compare_numbers

    compare_numbers(other, *_profile(params)[:2], as_json=as_json)


@app.command(rich_help_panel=RESULTS)
def check(
    files: Annotated[list[Path], typer.Argument(help="params.yaml files, or folders of profiles.")],
    images: Annotated[bool, typer.Option("--images", help="Also draw each subset from its images and check its sizes.")] = False,
) -> None:
    """Find mistakes in parameter files that would make a later stage fail; needs no images unless --images is given."""
    from isd_repro.check import check as find_mistakes

    failed: list[UserError] = []
    for file in files:
        try:
            find_mistakes(file, images=images, say=typer.echo)
        except UserError as error:
            failed.append(error)
    if failed:
        hints = dict.fromkeys(error.hint for error in failed)
        raise type(failed[0])("\n".join(error.message for error in failed), "; ".join(hints))


@app.command(rich_help_panel=RESULTS)
def rescue(params: ParamsFile = DEFAULT) -> None:
    """Restore a dvc.lock that is empty or cut off because DVC was stopped while writing it. Nothing is trained."""
    loaded, layout, _ = _profile(params)
    _dvc_lock(loaded, layout).rescue(typer.echo)


@app.command(rich_help_panel=RESULTS)
def evaluate(
    ckpt: Annotated[Path, typer.Option("--ckpt", help="A checkpoint from this or another project, in any supported layout.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder with train/<class>/* and val/<class>/*, or Tiny-ImageNet as folder or zip.")
    ] = None,
    prepared: Annotated[Path | None, typer.Option(help="A subset prepared by the pipeline, instead of --data.")] = None,
    listed: Annotated[
        Path | None,
        typer.Option("--list", help="A list of training images (D1 to D10, ImageNet-LT): use its classes and its groups."),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(help="Name of an evaluation, or all for the paper's (knn, linear). Long ones print a time estimate first."),
    ] = "knn",
    which: Annotated[
        Literal["student", "teacher", "both"], typer.Option(help="Which encoder of the file to evaluate.")
    ] = "student",
    arch: Annotated[str, typer.Option(help="Architecture, if the tensor shapes do not determine it.")] = "auto",
    teacher_bn: Annotated[Literal["own", "student"], typer.Option(help="BatchNorm statistics used for the teacher.")] = "own",
    key: Annotated[
        str | None, typer.Option(help="Container of the encoder in the file, such as state_dict_ema; default: detected.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Prefix of the encoder's tensors, such as module.backbone.; default: detected.")
    ] = None,
    padding: Annotated[
        Literal["1", "2", "same"] | None,
        typer.Option(help="Padding of a 3x3 stem, or TensorFlow's SAME; default: that of the file's layout."),
    ] = None,
    drop_unknown: Annotated[
        bool, typer.Option("--drop-unknown", help="Ignore modules that are neither part of the ResNet nor a known head.")
    ] = False,
    image_size: Annotated[int | None, typer.Option(help="Image size in pixels; default: from the file, else 224.")] = None,
    crop_ratio: Annotated[
        float | None, typer.Option(help="Size of the central crop / resized short side; default: from the file, else 0.875.")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="Mean per channel; default: from the file, else 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option(help="Std per channel; default: from the file, else 0.229,0.224,0.225.")] = None,
    k: Annotated[
        list[int] | None, typer.Option("--k", help="Number of nearest neighbours; can be repeated. Default: the evaluation's.")
    ] = None,
    linear_seeds: Annotated[
        int | None, typer.Option(help="Number of linear heads (seeds) to train, for a standard deviation; default: 1.")
    ] = None,
    linear_epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of the linear probe; default: 40, as in the paper."),
    ] = None,
    allow_shared_images: Annotated[
        bool,
        typer.Option("--allow-shared-images", help="Continue even if over 1 % of the queries are copies of training images."),
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Threads that decode images; does not change results.")] = None,
    cache: Annotated[bool, typer.Option(help="Cache features in .state/features for the next evaluation.")] = True,
    per_class: Annotated[bool, typer.Option(help="Also print the accuracy of each class.")] = False,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option(help="Write a record to this file; `report` includes records/<name>/external.json.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Row label in tables; default: the record's name.")] = None,
) -> None:
    """Evaluate any checkpoint on labelled images with the paper's protocols, without the pipeline."""
    from isd_repro.evaluations.external import Request, evaluate_checkpoint, numbers

    options = {"--k": tuple(k) if k else None, "--linear-seeds": linear_seeds, "--linear-epochs": linear_epochs}
    request = Request(
        ckpt=ckpt,
        data=data,
        prepared=prepared,
        listed=listed,
        protocol=protocol,
        which=which,
        arch=arch,
        teacher_bn=teacher_bn,
        key=key,
        prefix=prefix,
        padding=padding,
        drop_unknown=drop_unknown,
        allow_shared_images=allow_shared_images,
        image_size=image_size,
        crop_ratio=crop_ratio,
        mean=numbers("--mean", mean),
        std=numbers("--std", std),
        options={option: value for option, value in options.items() if value is not None},
        cache=cache,
        workers=workers,
        label=label,
        out=out,
        per_class=per_class,
        as_json=as_json,
    )
    evaluate_checkpoint(request, _console())


@app.command(rich_help_panel=RESULTS)
def figures(
    runs: RunNames,
    params: ParamsFile = DEFAULT,
    k: Annotated[
        int | None, typer.Option("--k", min=1, help="Number of k-means clusters; default: the number of classes.")
    ] = None,
    clusters: Annotated[int, typer.Option(min=1, help="Number of random clusters to show.")] = 12,
    members: Annotated[int, typer.Option(min=1, help="Number of random images to show per cluster.")] = 16,
    queries: Annotated[int, typer.Option(min=1, help="Number of random queries to show with their nearest anchors.")] = 6,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Random seed.")] = 0,
) -> None:
    """Draw clusters, nearest anchors and t-SNE of runs with their images, into a folder that git ignores."""
    from isd_repro import provenance
    from isd_repro.report.image_figures import Asked
    from isd_repro.report.image_figures import figures as draw

    provenance.remember_code()
    loaded, layout, console = _profile(params)
    for name in runs:
        draw(name, loaded, layout, Asked(k, clusters, members, queries, seed), console)


@app.command(rich_help_panel=RESULTS)
def variant(
    name: Annotated[str, typer.Argument(help="Name of the new run; if there are several, numbers or seeds are appended.")],
    source: Annotated[str, typer.Option("--from", help="The run to copy.")],
    params: ParamsFile = DEFAULT,
    changes: Annotated[list[str] | None, typer.Option("--set", "-S", help="key=value of the run; can be repeated.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs of each setting, which differ only in the seed.")] = 1,
    grid: Annotated[list[str] | None, typer.Option(help="key=v1,v2,...; can be repeated; every combination is a run.")] = None,
    sobol: Annotated[int, typer.Option(min=0, help="Number of points of a Sobol sequence over the ranges.")] = 0,
    ranges: Annotated[list[str] | None, typer.Option("--range", help="key=low..high; can be repeated; for --sobol.")] = None,
    trials: Annotated[
        bool, typer.Option("--trials", help="The new runs are trials, of which the report chooses the best of each method.")
    ] = False,
) -> None:
    """Write new runs into params.yaml: copies of a run with changed values, with several seeds, a grid or a Sobol design."""
    from isd_repro.profiles import variant as write

    write(
        name,
        source,
        params,
        typer.echo,
        changes=changes or (),
        seeds=seeds,
        grid=grid or (),
        sobol=sobol,
        ranges=ranges or (),
        trials=trials,
    )


@app.command(rich_help_panel=RESULTS)
def new(
    name: Annotated[str, typer.Argument(help="Name of the profile, and of its folder under pipelines/.")],
    source: Annotated[Path, typer.Option("--from", help="Folder or params.yaml of the profile to copy.")],
    images: Annotated[
        str, typer.Option(help="Environment variable that names your folder with train/<class>/ and val/<class>/.")
    ] = "",
    dataset: Annotated[str, typer.Option(help="Public name of these images.")] = "",
    changes: Annotated[list[str] | None, typer.Option("--set", "-S", help="key=value of params.yaml; can be repeated.")] = None,
) -> None:
    """Make a profile from another one, for example for your own images."""
    from isd_repro.profiles import new as make

    make(name, source, images, dataset, changes or (), typer.echo)


@run.command(name="remove")
def run_remove(
    runs: RunNames,
    params: ParamsFile = DEFAULT,
    force: Annotated[bool, typer.Option("--force", help="Also delete results.")] = False,
) -> None:
    """Remove runs from params.yaml and dvc.lock, with --force also their records, encoders, logs and resume state."""
    from isd_repro.profiles import remove

    remove(runs, params, typer.echo, force=force)


@run.command(name="rename")
def run_rename(
    old: Annotated[str, typer.Argument(help="Name of a run without results.")],
    new: Annotated[str, typer.Argument(help="Its new name.")],
    params: ParamsFile = DEFAULT,
) -> None:
    """Rename a run that has no results yet, wherever params.yaml names it."""
    from isd_repro.profiles import rename

    rename(old, new, params, typer.echo)


@run.command(name="import")
def run_import(
    folder: Annotated[Path, typer.Argument(help="Folder with pretrain.json, encoder.safetensors and metrics.jsonl of a run.")],
    params: ParamsFile = DEFAULT,
    force: Annotated[bool, typer.Option("--force", help="Replace a result of this run.")] = False,
) -> None:
    """Check a run that was trained elsewhere and import it into the profile and dvc.lock, so that it is not trained again."""
    from isd_repro.import_run import import_run

    import_run(folder, params, typer.echo, force=force)


@data.command(name="audit")
def data_audit(
    sets: Annotated[
        list[Path],
        typer.Argument(help="Lists of images, folders of lists, prepared subsets, or folders or zips of images."),
    ],
    words: Annotated[Path | None, typer.Option(help="File with class names, one `<class><tab><name>` per line.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the class sizes of all sets to this SVG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Report the class sizes of data sets; for the authors' lists also overlaps and what class size is confounded with."""
    from isd_repro.data.audit import audit

    found = audit(sets, words, as_json=as_json)
    if plot is not None:
        from isd_repro.report.figures import class_sizes
        from isd_repro.runtime.files import write_atomic

        write_atomic(plot, class_sizes({one.name: one.counts for one in found.sets}).svg().encode())


@checkpoint.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A torch or safetensors checkpoint from this or another project.")],
    key: Annotated[str | None, typer.Option(help="Search only this container of the file.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Search only for an encoder under this prefix.")] = None,
    as_json: AsJson = False,
) -> None:
    """List every tensor of a checkpoint and how it is used; exit with code 4 if the file cannot be loaded."""
    from isd_repro.checkpoints.inspection import show as account

    account(file, key, prefix, as_json=as_json)


@wandb.command(name="publish")
def wandb_publish(
    runs: Annotated[list[str] | None, typer.Argument(help="Names of runs in params.yaml; default: all.")] = None,
    params: ParamsFile = DEFAULT,
    anonymous: Anonymous = False,
    upload: Annotated[
        bool, typer.Option("--upload", help="Also upload encoders and features; otherwise only their hashes are sent.")
    ] = False,
) -> None:
    """Publish finished and failed runs to W&B. What W&B already has is not sent again."""
    from isd_repro.report import publish

    loaded, layout, console = _profile(params)
    publish.publish(runs or [], loaded, layout, publish.Options(anonymous=anonymous, upload=upload), console)


@wandb.command(name="dashboard")
def wandb_dashboard(
    params: ParamsFile = DEFAULT,
    dry_run: Annotated[
        Path | None, typer.Option("--dry-run", help="Write what would be sent to this file, without using the network.")
    ] = None,
    anonymous: Anonymous = False,
) -> None:
    """Build a W&B workspace and report for reviewers from the committed records."""
    from isd_repro.report.dashboard import dashboard

    loaded, layout, console = _profile(params)
    dashboard(loaded, layout, dry_run, anonymous=anonymous, console=console)


@paper.command(name="check")
def paper_check(as_json: AsJson = False) -> None:
    """Recompute every mean and difference in the published tables, and list where sources disagree."""
    from isd_repro.report.paper_checks import check as recompute

    recompute(as_json=as_json)


# --- the end of a command -----------------------------------------------------------------------------------------------


_TOO_LITTLE = r"out of memory|can't allocate|not enough memory|can't start new thread"  # as libraries say it


def main(commands: Callable[[], object] | None = None) -> None:
    """Run the command; a `UserError` becomes one message on standard error and its exit code."""
    # Read when torch loads. By default OpenMP's threads spin while they wait for each other, and so take the core from the
    # thread that they wait for as soon as another program wants one, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    streams.careful()
    try:
        _main(commands or app)
    except SystemExit as end:
        launcher.ended(end.code if isinstance(end.code, int) else EXIT_FAILURE)
        raise


def _main(commands: Callable[[], object]) -> None:
    try:
        signals.follow_dvc()
        launcher.follow()
        with signals.interrupt_on_signal():
            commands()
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:
            typer.secho("interrupted: finished outputs are kept, partial files were removed", err=True)
        _leave(end.code)
    except UserError as error:
        if not (launcher.rank() and isinstance(error, Preempted)):  # rank 0 says it, after the state is saved
            _say(error.message, error.hint)
        _leave(error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        from isd_repro.runtime.files import advice

        _say(f"{where}{error.strerror or error}", advice(error))
        _leave(EXIT_FAILURE)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(_TOO_LITTLE, str(error)):
            raise
        _say(
            f"not enough memory: {(str(error).splitlines() or [''])[0]}",
            "use a smaller batch size, bank or image size; see docs/reliability.md",
        )
        _leave(EXIT_FAILURE)
    except KeyboardInterrupt:
        _leave(EXIT_INTERRUPTED)
    _leave(0)


def _leave(code: str | int | None) -> Never:
    """Flush standard output and exit; a result that cannot be written is a failure."""
    try:
        sys.stdout.flush()
    except OSError as error:
        streams.drop(1)  # otherwise Python would try again and exit with another code
        if not code:
            _say(f"standard output: {error.strerror}", "check free disk space; files already written are complete")
        code = code or EXIT_FAILURE
    sys.exit(code)


def _say(message: str, hint: str) -> None:
    if launcher.rank() > 0:
        message = f"rank {launcher.rank()} of {launcher.ranks()}: {message}"
    typer.secho(f"error: {printable(message)}", fg=typer.colors.RED, err=True)
    if hint:
        typer.secho(f"hint: {printable(hint)}", err=True)
