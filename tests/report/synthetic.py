"""Synthetic profiles and records: random predictions with a wanted accuracy, scored by the package's own `score`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.config.reader import fingerprint
from isd_repro.provenance import Machine, Provenance
from isd_repro.records import (
    EvaluationRecord,
    Labels,
    ManifestIdentity,
    Mask,
    PretrainRecord,
    pack_labels,
    score_groups,
    write_record,
)

Part = Literal["pretrain", "knn", "linear"]
Encoder = Literal["student", "teacher"]
CLASSES = tuple(f"c{number}" for number in range(10))
LARGE = CLASSES[:2]


def sha(*words: object) -> str:
    """A made-up but stable sha256."""
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()


def profile(
    runs: Mapping[str, tuple[str, str]],
    rules: Mapping[str, dict[str, Any]],
    methods: Mapping[str, str] | None = None,
    **report: Any,
) -> Params:
    """Params whose `runs` maps a run to its (label, subset) and `rules` a subset to its rule; methods default to `isd`."""
    source = {"name": "digits", "dataset": "MNIST digits"}
    step = {"name": "step", "milestones": [6, 8], "factor": 0.2}
    views: dict[str, Any] = {"view_student": {}, "view_teacher": {}}
    return Params.model_validate(
        {
            "profile": "synthetic",
            "report": {"title": "Synthetic profile", "caption": "Random predictions.", **report},
            "subsets": {name: {"source": source, "rule": rule, "store": {"channels": 1}} for name, rule in rules.items()},
            "runs": {
                name: {
                    "label": label,
                    "notes": ["DEV-03 no blur at 28 px"],
                    "backbone": {"arch": "resnet-narrow", "stem": "small", "width": 16, "channels": 1},
                    "method": {"name": (methods or {}).get(name, "isd"), "tau_student": 0.02},
                    "optim": {"epochs": 10, "batch_size": 64, "lr": 0.05, "schedule": step},
                    "data": {"subset": subset, "image_size": 28, "mean": [0.5], "std": [0.5], **views},
                }
                for name, (label, subset) in runs.items()
            },
        }
    )


def layout(root: Path, params: Params) -> Layout:
    """A profile at the root of a repository."""
    return Layout(folder=root, root=root, profile=params.profile)


def manifest(params: Params, subset: str, queries: int) -> ManifestIdentity:
    """A manifest with two large classes where the rule is unbalanced."""
    rule = params.subsets[subset].rule
    large = LARGE if rule.name in ("unbalanced", "list") else ()
    shots: Any = {"many": CLASSES[:1], "medium": CLASSES[1:4], "few": CLASSES[4:]} if params.subsets[subset].shots else {}
    return ManifestIdentity(
        sha256=sha("manifest", subset),
        dataset=params.subsets[subset].source.dataset,
        subset=subset,
        rule=rule.model_dump(mode="json"),
        classes=CLASSES,
        large=large,
        shots=shots,
        train=1040,
        search=100,
        query=queries,
    )


def provenance(seconds: float = 83.5) -> Provenance:
    """A fixed origin."""
    machine = Machine(cpu="Some CPU @ 2.10GHz", cores=4, threads=2, gpu=None, system="Linux x86_64")
    versions = {"python": "3.11.9", "torch": "2.15.0", "torchvision": "0.29.2", "numpy": "2.4.6"}
    return Provenance(
        commit="5" * 40,
        dirty=False,
        source=sha("source"),
        versions=versions,
        machine=machine,
        written="2026-01-02T03:04:05+00:00",
        seconds=seconds,
    )


def predictions(label: Labels, accuracy: float, seed: int) -> Labels:
    """Right with probability `accuracy`, else another class at random."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(len(label), generator=generator).numpy() < accuracy
    wrong = (label + torch.randint(1, len(CLASSES), (len(label),), generator=generator).numpy()) % len(CLASSES)
    return np.where(right, label, wrong)


def masks(label: Labels, large: Iterable[str], shots: Mapping[Any, Iterable[str]] | None = None) -> dict[str, Mask]:
    """Query groups, from class names one query at a time."""

    def of(classes: Iterable[str]) -> Mask:
        return np.array([CLASSES[int(one)] in set(classes) for one in label])

    found = {"all": np.ones(len(label), dtype=np.bool_), **({"rare": ~of(large), "large": of(large)} if large else {})}
    return found | {group: of(classes) for group, classes in (shots or {}).items()}


def evaluation(
    params: Params,
    run: str,
    kind: str,
    given: Mapping[str, Labels],
    *,
    protocol: str = "paper",
    settings: Mapping[str, Any] | None = None,
    stored: bool = True,
) -> EvaluationRecord:
    """A record of the predictions `given` by "<encoder>/<metric>" for queries whose classes take turns."""
    queries = len(next(iter(given.values())))
    identity = manifest(params, params.runs[run].data.subset, queries)
    label = np.arange(queries) % len(CLASSES)
    groups = masks(label, identity.large, identity.shots)
    return EvaluationRecord(
        kind=kind,
        profile=params.profile,
        run=run,
        protocol="1-NN, 20-NN exact float32, ties by lowest label" if kind == "knn" else protocol,
        settings={"k": [1, 20]} if kind == "knn" else dict(settings or {"epochs": 40}),
        manifest=identity,
        encoder_sha256=sha("encoder", run),
        features_sha256=sha("features", run),
        scores=tuple(score for key, found in given.items() for score in score_groups(key, found, label, groups)),
        labels=pack_labels(label),
        predictions={key: pack_labels(found) for key, found in given.items()} if stored else {},
        provenance=provenance(4.2),
    )


def write_run(
    where: Layout,
    params: Params,
    run: str,
    accuracy: float,
    *,
    queries: int = 500,
    parts: Iterable[Part] = ("pretrain", "knn"),
    encoders: tuple[Encoder, ...] = ("student", "teacher"),
    seed: int = 0,
    loss: float = 5.0,
) -> None:
    """Write the parts of one run's record; student accuracy as given, teacher's a little lower."""
    label, epochs = np.arange(queries) % len(CLASSES), params.runs[run].optim.epochs
    for part in parts:
        if part == "pretrain":
            groups_of_run = params.runs[run].model_dump(mode="json", exclude={"label", "notes"})
            record: Any = PretrainRecord(
                profile=params.profile,
                run=run,
                manifest=manifest(params, params.runs[run].data.subset, queries),
                encoder_sha256=sha("encoder", run),
                label=params.runs[run].label,
                notes=params.runs[run].notes,
                config=groups_of_run,
                fingerprint=fingerprint(groups_of_run),
                encoders=encoders,
                steps=16 * epochs,
                curve=tuple({"epoch": float(at), "lr": 0.05, "loss": loss * 0.8**at + 0.3} for at in range(1, epochs + 1)),
                sources=(sha("source"),),
                provenance=provenance(),
            )
        else:
            given = {}
            for encoder in encoders if part == "knn" else encoders[:1]:
                for at, metric in enumerate(("1-NN", "20-NN") if part == "knn" else ("linear-last", "linear-best")):
                    lower = encoder == "teacher"
                    given[f"{encoder}/{metric}"] = predictions(label, accuracy - 0.05 * lower, seed + 17 * at + lower)
            record = evaluation(params, run, part, given)
        write_record(where.record(run, part), record)


def write_counts(
    where: Layout,
    params: Params,
    run: str,
    right: Mapping[str, int],
    *,
    queries: int = 100,
    metric: str = "1-NN",
    stored: bool = True,
) -> None:
    """A record in which so many queries of a group or class are answered rightly, and no others."""
    identity = manifest(params, params.runs[run].data.subset, queries)
    label = np.arange(queries) % len(CLASSES)
    groups = masks(label, identity.large, identity.shots)
    predicted = (label + 1) % len(CLASSES)
    for name, hits in right.items():
        places = np.flatnonzero(groups[name] if name in groups else label == CLASSES.index(name))[:hits]
        predicted[places] = label[places]
    kind = "linear" if metric.startswith("linear") else "knn"
    write_record(where.record(run, kind), evaluation(params, run, kind, {f"student/{metric}": predicted}, stored=stored))


def with_k(params: Params, *k: int) -> Params:
    """The same profile with other numbers of neighbours."""
    return params.model_copy(update={"evaluation": params.evaluation.model_validate({"knn": {"k": k}})})
