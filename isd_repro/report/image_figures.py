"""Command `figures`: clusters, nearest anchors and t-SNE of a run's features, shown with the images.

The files go to `runs/<run>/figures/`, which git ignores, because thumbnails of a data set may not be published. This is not a
stage of the pipeline, since no number of a table depends on it. Everything is rendered from `figures.json` and the packed images.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from isd_repro import methods
from isd_repro.config.fields import Frozen
from isd_repro.config.layout import Layout, snapshots_in
from isd_repro.config.params import Params
from isd_repro.config.reader import find_run, fingerprint
from isd_repro.data import contact_sheet
from isd_repro.data.eval_loader import Frame, StoreReader, centred
from isd_repro.data.loader import generator_of
from isd_repro.data.manifests import Prepared, open_prepared
from isd_repro.evaluations.arithmetic import best_device
from isd_repro.evaluations.encoders import check_manifest, load_encoders
from isd_repro.evaluations.features import Features, features, load_features, require_finite
from isd_repro.provenance import source_hash
from isd_repro.report import clusters, image_pages, tsne
from isd_repro.report.clusters import scikit_learn
from isd_repro.report.templating import environment
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import sha256_file, write_atomic
from isd_repro.tensor_files import EncoderIdentity, load_tensors
from isd_repro.tracking import open_stage

BANK = 4096  # anchors if the method has no bank
TOP = 10  # anchors shown of each query, as in the paper
PACKAGES = ("torch", "numpy", "scikit-learn", "pillow", "jinja2")


@dataclass(frozen=True)
class Asked:
    """Options of the command."""

    k: int | None = None  # number of clusters of k-means; None means as many as classes
    clusters: int = 12  # number of clusters to show
    members: int = 16  # number of images to show per cluster
    queries: int = 6  # number of queries to show with their anchors
    seed: int = 0  # of every draw, 0..2**32-1


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
        """The encoder of the main tables: the student."""
        return "student" if "student" in self.encoders else next(iter(self.encoders))

    @property
    def target(self) -> str:
        """The encoder that fills the bank: the teacher, or the only one there is."""
        return "teacher" if "teacher" in self.encoders else self.main

    def draws(self, purpose: str) -> torch.Generator:
        """A separate generator for each purpose, so that figures do not affect each other."""
        return generator_of(self.asked.seed, "figures", purpose)

    def image(self, position: int) -> dict[str, Any]:
        """Facts about one image; `position` is its row in images.tsv and in the store."""
        image = self.prepared.manifest.images[position]
        return {"split": image.split, "class": image.cls, "file": image.file, "position": position}


def figures(name: str, params: Params, layout: Layout, asked: Asked, console: Console) -> None:
    """Write clusters.html, anchors.html, tsne.svg and figures.json of one run; equal input gives equal bytes on one machine.

    Raises:
        ConfigError: there is no such run, or there are more clusters than images.
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
    thumbs = contact_sheet.data_uris(run.prepared.store, image_pages.positions(facts))
    folder = layout.encoder(name).parent / "figures"
    files = image_pages.render(facts, thumbs)
    facts["files"] = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    files[".gitignore"] = b"*\n"  # so that git ignores the folder in every profile
    files["figures.json"] = json.dumps(facts, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
    for file, content in files.items():
        write_atomic(folder / file, content)
    identity = fingerprint(facts["files"])
    with open_stage("figures", name, params, layout, identity=identity, config=image_pages.config(facts)) as tracker:
        purity = {f"clusters/{key}": facts["clusters"][key] for key in ("purity", "purity_of_shuffled_labels")}
        tracker.log({"epoch": params.runs[name].optim.epochs, **purity})
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


def _clusters(run: _Run) -> dict[str, Any]:
    """Random clusters and members, with their purity and the purity of the same cluster sizes under shuffled labels."""
    classes, label = run.prepared.identity.classes, run.features.search_label
    k = len(classes) if run.asked.k is None else run.asked.k
    found = clusters.k_means(run.features.search[run.main], k, run.asked.seed)
    assignment = torch.from_numpy(found.labels_).long()
    counts_KC = clusters.counts(assignment, label, k)
    sizes, most, hits = (each.tolist() for each in (counts_KC.sum(dim=1), counts_KC.argmax(dim=1), counts_KC.amax(dim=1)))
    draws = run.draws("shuffled labels")
    orders = [torch.randperm(len(label), generator=draws) for _ in range(clusters.SHUFFLES)]
    shuffled = [int(clusters.counts(assignment, label[order], k).amax(dim=1).sum()) for order in orders]
    index = run.prepared.split("search").index
    chosen = clusters.choose(assignment, run.asked.clusters, run.asked.members, run.draws("clusters"))
    return {
        "encoder": run.main,
        "images": len(label),
        "split": "search",
        "k": k,
        "algorithm": "k-means on L2-normalised features: k-means++, Lloyd, one start",
        "iterations": found.n_iter_,
        "iterations_at_most": clusters.ITERATIONS,
        "inertia": float(found.inertia_),
        "assignment_sha256": _sha256(assignment),
        "empty": sizes.count(0),
        "purity": 100 * sum(hits) / len(label),
        "purity_of_shuffled_labels": 100 * fmean(shuffled) / len(label),
        "all": [
            {"cluster": at, "size": size, "purity": 100 * hit / max(1, size), "class": classes[cls] if size else None}
            for at, (size, cls, hit) in enumerate(zip(sizes, most, hits, strict=True))
        ],
        "shown": [
            {"cluster": number, "members": [run.image(position) for position in index[inside].tolist()]}
            for number, inside in chosen
        ],
    }


def _anchors(run: _Run) -> dict[str, Any]:
    """The nearest anchors of random queries, and soft targets over all anchors (the paper's first figure).

    With unit-norm teacher and student embeddings k and q of a query and the K anchors x_i of a bank,

        p_t(i) = softmax_i(k . x_i / tau_teacher),    p_s(i) = softmax_i(q . x_i / tau_student)

    are the paper's. A contrastive loss has a one-hot target instead: 1 on the other view of the query, 0 on every anchor. The
    bank holds the teacher's embeddings (in eval mode) of training images in the evaluation view; queries are validation images.
    """
    train, query = run.prepared.split("train"), run.prepared.split("query")
    wanted = getattr(run.method, "bank_size", None)
    filled = torch.randperm(len(train), generator=run.draws("bank"))[: wanted or BANK]
    asked = torch.randperm(len(query), generator=run.draws("queries"))[: run.asked.queries]
    target = {run.target: run.encoders[run.target]}
    bank_KD = functional.normalize(_features(run.prepared, run.identity, target, train.index[filled])[run.target].double(), dim=1)

    def cosine(encoder: str) -> Tensor:
        """Q x K, float64."""
        return functional.normalize(run.features.query[encoder][asked].double(), dim=1) @ bank_KD.T

    tau_student = getattr(run.method, "tau_student", getattr(run.method, "tau", None))
    tau = {"teacher": getattr(run.method, "tau_teacher", None), "student": tau_student}
    similar = {"teacher": cosine(run.target), "student": cosine(run.main)}
    probability = {who: torch.softmax(similar[who] / value, dim=1) for who, value in tau.items() if value is not None}
    entropy = {who: torch.special.entr(found).sum(dim=1) for who, found in probability.items()}  # nats
    likeliest = {who: found.topk(min(TOP, len(filled)), dim=1).values for who, found in probability.items()}
    near = similar["teacher"].sort(dim=1, descending=True, stable=True).indices[:, :TOP]  # the lower position of equals first
    shown = []
    for row, position in enumerate(query.index[asked].tolist()):
        cards = [
            run.image(int(train.index[filled[column]]))
            | {"similarity": float(similar["teacher"][row, column])}
            | {"probability": {who: float(found[row, column]) for who, found in probability.items()}}
            for column in near[row].tolist()
        ]
        measures = {
            who: {"entropy": float(entropy[who][row]), "top10": float(best[row].sum()), "highest": float(best[row, 0])}
            for who, best in likeliest.items()
        }
        shown.append({"query": run.image(position), "spread": measures, "anchors": cards})
    return {
        "bank": {"images": len(filled), "asked": wanted, "split": "train", "view": "evaluation", "encoder": run.target},
        "positions_sha256": _sha256(train.index[filled]),
        "embedding": _embedding(run.method),
        "tau": tau,
        "one_hot": {"other view of the query": 1.0, "each anchor": 0.0, "entropy": 0.0, "top10": 0.0},
        "mean_spread": {
            who: {"entropy": float(entropy[who].mean()), "top10": float(best.sum(dim=1).mean())}
            for who, best in likeliest.items()
        },
        "shown": shown,
    }


def _embedding(method: Frozen) -> dict[str, str | bool]:
    """A note on how the compared features differ from those in the loss: an encoder file has no projector and no predictor."""
    pooled = "pooled features of the backbone, L2-normalised"
    if getattr(method, "bank_size", None) is None:
        known = f"{pooled}; the method has no bank"
        return {"teacher_as_in_training": False, "teacher": known, "student": known}
    same = getattr(method, "heads", None) == "none"
    behind = f"{pooled}, not the output of the {{}} after it, which the loss compares but an encoder file does not contain"
    teacher = f"{pooled}, as in the bank of training" if same else behind.format("projector")
    student = behind.format("predictor") if same else behind.format("heads")
    return {"teacher_as_in_training": same, "teacher": teacher, "student": student}


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
    """One t-SNE drawing with the nearest-neighbour accuracy among its points, by cosine similarity of their features."""
    require_finite(rows, "query features")
    unit_ND = functional.normalize(rows.float(), dim=1)
    points, divergence = tsne.draw(unit_ND, run.asked.seed)
    similarity = (unit_ND.double() @ unit_ND.double().T).fill_diagonal_(-torch.inf)
    return {
        "epoch": epoch,
        "file": path.name,
        "sha256": sha256_file(path),
        "divergence": divergence,
        "neighbours": 100 * float((label[similarity.argmax(dim=1)] == label).double().mean()),
        "points": [[round(value, 3) for value in point] for point in points.tolist()],
    }


def _snapshot(path: Path, run: _Run, index: Tensor) -> Tensor:
    """Features of a snapshot; `DataError` if it belongs to another run."""
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


def _features(prepared: Prepared, identity: EncoderIdentity, encoders: dict[str, nn.Module], index: Tensor) -> dict[str, Tensor]:
    """Features of the images at these positions of the store, computed as in the stage `extract`."""
    device = best_device()
    frame = Frame(identity.image_size, identity.crop_ratio, identity.mean, identity.std)
    return features(encoders, centred(StoreReader(prepared.store), index, frame, device), len(index), device)


def _sha256(values: Tensor) -> str:
    """Of int64 values, little-endian."""
    return hashlib.sha256(values.numpy().astype("<i8").tobytes()).hexdigest()
