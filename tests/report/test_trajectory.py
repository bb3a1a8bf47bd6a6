"""Teacher against student over training: what a record must say, and where its numbers stand in the figure."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from isd_repro.artifacts import Score, TrajectoryPoint, TrajectoryRecord, write_record
from isd_repro.errors import DataError
from isd_repro.report import trajectory
from tests.report import synthetic
from tests.report.conftest import Profile

EARLY = {("student", "all"): 100, ("teacher", "all"): 60, ("student", "rare"): 40, ("teacher", "rare"): 20}
SIZES = {"all": 500, "rare": 400, "large": 100}


def record(profile: Profile, name: str = "isd") -> TrajectoryRecord:
    """Two snapshots with chosen counts, and the run's own last scores."""
    found = profile.records().runs[name]
    assert found.knn is not None
    early = tuple(
        Score(encoder=encoder, metric="1-NN", group=group, correct=EARLY[encoder, group], n=SIZES[group])  # type: ignore[arg-type]
        for encoder, group in EARLY
    )
    later = tuple(score.model_copy(update={"correct": score.correct + 20}) for score in early)
    return TrajectoryRecord(
        profile=profile.params.profile,
        run=name,
        protocol="1-NN, 20-NN exact float32, ties by lowest label",
        settings={"k": [1, 20]},
        manifest=found.knn.record.manifest,
        points=(
            TrajectoryPoint(epoch=2, encoder_sha256=synthetic.sha("two"), scores=early),
            TrajectoryPoint(epoch=6, encoder_sha256=synthetic.sha("six"), scores=later),
            TrajectoryPoint(epoch=10, encoder_sha256=synthetic.sha("encoder", name), scores=found.knn.record.scores),
        ),
        provenance=synthetic.provenance(),
    )


def save(profile: Profile, found: TrajectoryRecord) -> None:
    write_record(profile.layout.record(found.run, "trajectory"), found)


def test_points_stand_where_their_numbers_say(profile: Profile) -> None:
    save(profile, record(profile))
    found = trajectory.load(profile.params, profile.layout, profile.records())
    assert list(found) == ["isd"]
    drawn = trajectory.figure(profile.params, found, "small")
    assert drawn is not None
    panels = {panel.title: panel for panel in drawn.panels}
    assert list(panels) == ["All", "Rare", "Large"]
    assert len(panels["Large"].curves[0].points) == 1  # the snapshots have no such score
    curves = {curve.teacher: curve for curve in panels["All"].curves}
    assert [title.rpartition(": ")[0] for title in curves[True].titles] == [
        f"ISD, teacher, all, epoch {epoch}" for epoch in (2, 6, 10)
    ]
    assert [title.rpartition(": ")[2] for title in curves[False].titles[:2]] == ["20.0 %", "24.0 %"]
    (x0, y0), (x1, y1), (x2, _) = curves[False].points
    assert x1 - x0 == pytest.approx(x2 - x1)  # epochs 2, 6, 10
    assert x0 == pytest.approx(panels["All"].x)
    assert x2 == pytest.approx(panels["All"].x + drawn.plot_width)
    per_point = (y0 - y1) / 4  # px per percent, upwards
    assert per_point > 0
    assert curves[True].points[0][1] - y0 == pytest.approx(8 * per_point)  # teacher 12 %, student 20 %
    rare = {curve.teacher: curve for curve in panels["Rare"].curves}
    assert rare[False].points[0][1] - y0 == pytest.approx(10 * per_point)  # rare 10 %: one scale for all panels
    assert all(
        drawn.top <= y <= drawn.top + drawn.plot_height for panel in drawn.panels for c in panel.curves for _, y in c.points
    )


def test_no_record_is_no_figure(profile: Profile) -> None:
    found = trajectory.load(profile.params, profile.layout, profile.records())
    assert found == {}
    assert trajectory.figure(profile.params, found, "small") is None


def changed(found: TrajectoryRecord, at: int, **update: object) -> TrajectoryRecord:
    points = list(found.points)
    points[at] = points[at].model_copy(update=update)
    return found.model_copy(update={"points": tuple(points)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.model_copy(update={"run": "moco"}), "run is 'moco', expected 'isd'"),
        (lambda r: r.model_copy(update={"profile": "demo"}), "profile is 'demo'"),
        (lambda r: r.model_copy(update={"manifest": r.manifest.model_copy(update={"sha256": "0"})}), "manifest.sha256 is '0'"),
        (lambda r: r.model_copy(update={"points": r.points[::-1]}), "epochs is [10, 6, 2], expected [2, 6, 10]"),
        (lambda r: r.model_copy(update={"points": r.points[:2]}), "last point's encoder_sha256"),
        (lambda r: changed(r, 2, epoch=11), "last epoch is 11, expected 10"),
        (lambda r: changed(r, 2, scores=r.points[1].scores), "last point's scores"),
        (
            lambda r: changed(r, 0, scores=(r.points[0].scores[0].model_copy(update={"correct": 501}),)),
            "scores of epoch 2 out of range is ['1-NN']",
        ),
    ],
)
def test_a_record_that_disagrees_is_refused(
    profile: Profile, change: Callable[[TrajectoryRecord], TrajectoryRecord], words: str
) -> None:
    found = change(record(profile))
    write_record(profile.layout.record("isd", "trajectory"), found)
    with pytest.raises(DataError) as caught:
        trajectory.load(profile.params, profile.layout, profile.records())
    assert words in caught.value.message
    assert str(profile.layout.record("isd", "trajectory")) in caught.value.message


def test_the_page_shows_the_figure_and_its_numbers(profile: Profile) -> None:
    assert "Teacher and student over training" not in profile.files()["index.html"]
    save(profile, record(profile))
    files = profile.files()
    assert "ISD, teacher, all, epoch 2: 12.0 %" in files["trajectory-small.svg"]
    assert "ISD, teacher, all, epoch 2: 12.0 %" in files["index.html"]
    assert "![Scores by epoch](trajectory-small.svg)" in files["table.md"]
