"""Command `figures`: clusters, nearest anchors and t-SNE of a run's features, shown with the images.

Writes into `runs/<run>/figures/`, which git ignores: thumbnails of a data set are not ours to publish. No stage of the
pipeline, since no number of a table depends on it. All that is drawn is rendered from `figures.json` and the packed images.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from isd_repro import methods
from isd_repro.config.fields import Frozen
from isd_repro.config.layout import Layout, snapshots_in
from isd_repro.config.params import Params
from isd_repro.config.reader import find_run
from isd_repro.data import contact_sheet
from isd_repro.data.eval_loader import Frame, StoreReader, centred
from isd_repro.data.loader import generator_of
from isd_repro.data.manifests import Prepared, open_prepared
from isd_repro.evaluations.arithmetic import best_device
from isd_repro.evaluations.encoders import EncoderIdentity, check_manifest, load_encoders
from isd_repro.evaluations.features import Features, features, load_features
from isd_repro.provenance import source_hash
from isd_repro.report import anchors, clusters, image_pages, tsne
from isd_repro.report.clusters import scikit_learn
from isd_repro.report.templating import environment
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import sha256_file, write_atomic
from isd_repro.tensor_files import load_tensors
from isd_repro.tracking import names, open_stage

BANK = 4096  # anchors where the method has no bank of its own
PACKAGES = ("torch", "numpy", "scikit-learn", "pillow", "jinja2")


@dataclass(frozen=True)
class Asked:
    """Options of the command.

    Attributes:
        k: clusters of k-means; None means as many as classes.
        clusters: how many of them are shown.
        members: how many images of each are shown.
        queries: how many queries are shown with their anchors.
        seed: of every draw, 0..2**32-1.
    """

    k: int | None = None
    clusters: int = 12
    members: int = 16
    queries: int = 6
    seed: int = 0


@dataclass(frozen=True)
class _Run:
    """A run with its files opened and checked against each other."""

    name: str
    path: Path  # of the encoder file
    sha256: str
    encoders: dict[str, nn.Module]
    identity: EncoderIdentity
    prepared: Prepared
    features: Features
    method: Frozen
    asked: Asked

    @property
    def main(self) -> str:
        """The encoder that tables are about: the student."""
        return "student" if "student" in self.encoders else next(iter(self.encoders))

    @property
    def target(self) -> str:
        """The encoder that fills the bank: the teacher, or the only one there is."""
        return "teacher" if "teacher" in self.encoders else self.main

    def draws(self, purpose: str) -> torch.Generator:
        """A generator of its own for each purpose, so that no figure changes another."""
        return generator_of(self.asked.seed, "figures", purpose)

    def image(self, position: int) -> dict[str, Any]:
        """What is said of one image; `position` is its row in images.tsv and in the store."""
        image = self.prepared.manifest.images[position]
        return {"split": image.split, "class": image.cls, "file": image.file, "position": position}


def figures(name: str, params: Params, layout: Layout, asked: Asked, console: Console) -> None:
    """Write clusters.html, anchors.html, tsne.svg and figures.json of one run; equal input gives equal bytes on one machine.

    Raises:
        ConfigError: no such run, or more clusters than images.
        DataError: a file is missing, damaged, of another run, or made from other images or another encoder.
        UserError: a package of the extras `figures` and `report` is missing.
    """
    with scikit_learn():
        pass  # said before minutes of work
    environment("html")  # likewise
    run = _open(name, params, layout, asked)
    facts: dict[str, Any] = {
        "format": 1,
        "kind": "figures",
        "profile": params.profile,
        "run": name,
        "label": params.runs[name].label,
        "method": {"name": params.runs[name].method.name, **run.method.model_dump(mode="json")},
        "dataset": run.prepared.identity.dataset,
        "subset": run.prepared.identity.subset,
        "manifest": run.prepared.identity.sha256,
        "encoder_sha256": run.sha256,
        "features_sha256": sha256_file(layout.features(name)),
        "seed": asked.seed,
        "source": source_hash(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "clusters": _clusters(run),
        "anchors": _anchors(run),
        "tsne": _tsne(run, layout.snapshots(name)),
    }
    thumbs = contact_sheet.data_uris(run.prepared.store, {image["position"] for image in image_pages.images(facts)})
    folder = layout.encoder(name).parent / "figures"
    files = image_pages.render(facts, thumbs)
    facts["files"] = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    files[".gitignore"] = b"*\n"  # wherever the profile lies
    files["figures.json"] = json.dumps(facts, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
    for file, content in files.items():
        write_atomic(folder / file, content)
    identity = names.digest(facts["files"])
    with open_stage("figures", name, params, layout, identity=identity, config=image_pages.config(facts)) as tracker:
        tracker.log({"epoch": params.runs[name].optim.epochs, **image_pages.shown(facts)})
        for key, rows, caption in image_pages.sheets(facts):
            tracker.log_image(key, contact_sheet.grid(run.prepared.store, rows), caption)
    console.print(str(folder), highlight=False, markup=False, soft_wrap=True)


def _open(name: str, params: Params, layout: Layout, asked: Asked) -> _Run:
    run = find_run(params, name)
    method = methods.config_of(name, run.method, layout.file)
    path = layout.encoder(name)
    sha256 = sha256_file(path)
    found = load_features(layout.features(name), sha256)
    encoders, identity = load_encoders(path)
    prepared = open_prepared(layout.prepared(run.data.subset))
    check_manifest(path, identity.manifest, prepared.identity.sha256)
    return _Run(name, path, sha256, encoders, identity, prepared, found, method, asked)


# --- clusters -----------------------------------------------------------------------------------------------------------


def _clusters(run: _Run) -> dict[str, Any]:
    classes, label = run.prepared.identity.classes, run.features.search_label
    k = len(classes) if run.asked.k is None else run.asked.k
    found = clusters.fit(run.features.search[run.main], k, run.asked.seed)
    every = clusters.tally(found.assignment, label, k)
    index = run.prepared.split("search").index
    chosen = clusters.choose(found.assignment, run.asked.clusters, run.asked.members, run.draws("clusters"))
    return {
        "encoder": run.main,
        "images": len(label),
        "split": "search",
        "k": k,
        "algorithm": "k-means on L2-normalised features: k-means++, Lloyd, one start",
        "iterations": found.iterations,
        "iterations_at_most": clusters.ITERATIONS,
        "inertia": found.inertia,
        "assignment_sha256": found.sha256,
        "empty": sum(cluster.size == 0 for cluster in every),
        "purity": clusters.purity(every),
        "purity_of_shuffled_labels": clusters.shuffled_purity(found.assignment, label, k, run.draws("shuffled labels")),
        "all": [
            {
                "cluster": cluster.number,
                "size": cluster.size,
                "purity": cluster.purity,
                "class": classes[cluster.label] if cluster.size else None,
            }
            for cluster in every
        ],
        "shown": [
            {"cluster": number, "members": [run.image(position) for position in index[inside].tolist()]}
            for number, inside in chosen
        ],
    }


# --- anchors ------------------------------------------------------------------------------------------------------------


def _anchors(run: _Run) -> dict[str, Any]:
    """A bank of training images in the evaluation's view, through the teacher in eval mode; queries are validation images."""
    train, query = run.prepared.split("train"), run.prepared.split("query")
    wanted = getattr(run.method, "bank_size", None)
    filled = _draw(len(train), wanted or BANK, run.draws("bank"))
    asked = _draw(len(query), run.asked.queries, run.draws("queries"))
    target = {run.target: run.encoders[run.target]}
    bank = _features(run.prepared, run.identity, target, train.index[filled])[run.target]
    seen = {name: anchors.cosine(run.features.query[name][asked], bank) for name in dict.fromkeys((run.target, run.main))}
    tau = {
        "teacher": getattr(run.method, "tau_teacher", None),
        "student": getattr(run.method, "tau_student", getattr(run.method, "tau", None)),
    }
    similar = {"teacher": seen[run.target], "student": seen[run.main]}
    probability = {who: anchors.probabilities(similar[who], value) for who, value in tau.items() if value is not None}
    spreads = {who: anchors.spread(found) for who, found in probability.items()}
    near = anchors.nearest(seen[run.target])
    shown = []
    for row, position in enumerate(query.index[asked].tolist()):
        columns = near[row].tolist()
        cards = [run.image(place) for place in train.index[filled][near[row]].tolist()]
        for card, column in zip(cards, columns, strict=True):
            card["similarity"] = float(seen[run.target][row, column])
            card["probability"] = {who: float(found[row, column]) for who, found in probability.items()}
        measures = {
            who: {"entropy": float(found.entropy[row]), "top10": float(found.top[row]), "highest": float(found.highest[row])}
            for who, found in spreads.items()
        }
        shown.append({"query": run.image(position), "spread": measures, "anchors": cards})
    means = {who: {"entropy": float(found.entropy.mean()), "top10": float(found.top.mean())} for who, found in spreads.items()}
    return {
        "bank": {"images": len(filled), "asked": wanted, "split": "train", "view": "evaluation", "encoder": run.target},
        "positions_sha256": _sha256(train.index[filled]),
        "embedding": _embedding(run.method),
        "tau": tau,
        "one_hot": {"other view of the query": 1.0, "each anchor": 0.0, "entropy": 0.0, "top10": 0.0},
        "mean_spread": means,
        "shown": shown,
    }


def _embedding(method: Frozen) -> dict[str, str | bool]:
    """How far what is compared here is what the loss compared: an encoder file holds no projector and no predictor."""
    pooled = "pooled features of the backbone, L2-normalised"
    if getattr(method, "bank_size", None) is None:
        known = f"{pooled}; the method has no bank"
        return {"teacher_as_in_training": False, "teacher": known, "student": known}
    same = getattr(method, "heads", None) == "none"
    behind = f"{pooled}, and not the output of the {{}} behind it, which training compared and an encoder file lacks"
    teacher = f"{pooled}, as in the bank of training" if same else behind.format("projector")
    student = behind.format("predictor") if same else behind.format("heads")
    return {"teacher_as_in_training": same, "teacher": teacher, "student": student}


# --- t-SNE --------------------------------------------------------------------------------------------------------------


def _tsne(run: _Run, folder: Path) -> dict[str, Any]:
    """One panel for each snapshot, in order, and one for the run's encoder."""
    split = run.prepared.split("query")
    chosen = tsne.choose(split.label, run.draws("t-SNE"))
    label = split.label[chosen]
    kept = snapshots_in(folder).items()
    panels = [_panel(run, label, _snapshot(path, run, split.index[chosen]), path, epoch) for epoch, path in kept]
    panels.append(_panel(run, label, run.features.query[run.main][chosen], run.path, None))
    shown = sorted(set(label.tolist()))
    return {
        "encoder": run.main,
        "split": "query",
        "classes": [run.prepared.identity.classes[cls] for cls in shown],
        "class_of_point": [shown.index(cls) for cls in label.tolist()],
        "image_of_point": split.index[chosen].tolist(),
        "perplexity_at_most": tsne.PERPLEXITY,
        "panels": panels,
    }


def _panel(run: _Run, label: Tensor, rows: Tensor, path: Path, epoch: int | None) -> dict[str, Any]:
    drawn = tsne.draw(rows, label, run.asked.seed)
    return {
        "epoch": epoch,
        "file": path.name,
        "sha256": sha256_file(path),
        "input_sha256": drawn.input_sha256,
        "divergence": drawn.divergence,
        "neighbours": drawn.neighbours,
        "points": [[round(value, 3) for value in point] for point in drawn.points.double().tolist()],
    }


def _snapshot(path: Path, run: _Run, index: Tensor) -> Tensor:
    """Features of a snapshot of this very run; `DataError` where it is another's."""
    encoders, identity = load_encoders(path)
    check_manifest(path, identity.manifest, run.prepared.identity.sha256)
    ours, theirs = (load_tensors(file, "encoder")[1] for file in (run.path, path))
    for key in ("run", "fingerprint"):
        if ours.get(key) != theirs.get(key):
            message = f"{path}: a snapshot of {key} {theirs.get(key)!r}, but {run.path.name} is of {ours.get(key)!r}"
            raise DataError(message, "delete the snapshots and run `pretrain` again")
    if run.main not in encoders:
        raise DataError(f"{path}: holds {', '.join(encoders)} and no {run.main}", "delete it and run `pretrain` again")
    return _features(run.prepared, identity, {run.main: encoders[run.main]}, index)[run.main]


# --- shared -------------------------------------------------------------------------------------------------------------


def _features(prepared: Prepared, identity: EncoderIdentity, encoders: dict[str, nn.Module], index: Tensor) -> dict[str, Tensor]:
    """Features of the images at these positions of the store, as the stage `extract` makes them."""
    device = best_device()
    frame = Frame(identity.image_size, identity.crop_ratio, identity.mean, identity.std)
    return features(encoders, centred(StoreReader(prepared.store), index, frame, device), len(index), device)


def _draw(count: int, wanted: int, draws: torch.Generator) -> Tensor:
    """Positions of at most `wanted` of `count` things, in the order drawn."""
    return torch.randperm(count, generator=draws)[:wanted]


def _sha256(positions: Tensor) -> str:
    return hashlib.sha256(positions.numpy().astype("<i8").tobytes()).hexdigest()
