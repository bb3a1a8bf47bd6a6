"""Evaluate the encoders saved during training, epoch by epoch.

This gives the nearest-neighbour accuracy of student and teacher over training, the paper's second figure. The settings are those
of `knn`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isd_repro.config.fields import Frozen
from isd_repro.evaluations import knn
from isd_repro.records import CurvePoint, score_groups

if TYPE_CHECKING:
    from isd_repro.evaluations.subject import Curve, Subject

TITLE = "Over training"
METRICS = r"(?!)"  # those of `knn`
OWN_TABLE = True


class Config(Frozen):
    """No keys: the settings are those of `knn`."""


def protocol(evaluation: Any) -> str:
    """The protocol of `knn`."""
    return knn.protocol(evaluation)


def columns(config: Config) -> list[str]:
    """No columns: the scores are the metrics of `knn` by epoch."""
    return []


def settings(evaluation: Any) -> dict[str, Any]:
    """The settings of `knn`, as the record states them."""
    return dict(evaluation.knn.model_dump(mode="json"))


def evaluate(subject: Subject, config: Config) -> Curve:
    """Score every snapshot of a run and its final encoders by nearest neighbours.

    Raises:
        DataError: there is no snapshot, or one is missing, damaged, of another run, or made from other images.
    """
    from isd_repro.evaluations.subject import Curve

    search = subject.config(knn.Config)
    identity = {"trajectory": subject.sha256, "manifest": subject.manifest.sha256, "k": list(search.k)}
    points = []
    for epoch, opened in subject.snapshots().items():
        one = opened()

        def score(epoch: int = epoch, one: Subject = one) -> CurvePoint:
            label = one.split("query").label.numpy()
            groups = one.prepared.groups(label)
            found = knn.evaluate(one, search).arrays
            scores = [s for key, rows in found.items() for s in score_groups(key, rows, label, groups)]
            return CurvePoint(epoch=epoch, encoder_sha256=one.sha256, scores=tuple(scores))

        points.append(subject.part(identity, f"{epoch}-{one.sha256}", CurvePoint, score))
        for s in points[-1].scores:
            subject.progress.say(f"{subject.name} epoch {epoch} {s.encoder} {s.metric} {s.group} {s.top1:.1f} % (n={s.n})")
    return Curve(tuple(points))
