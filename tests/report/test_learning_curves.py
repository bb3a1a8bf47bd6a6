"""Teacher against student over training: what a record must say, and where its numbers stand in the figure."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isd_repro.records import CurvePoint, CurveRecord, Score, write_record
from isd_repro.report import figures, learning_curves
from isd_repro.report.paper import load as published
from isd_repro.runtime.errors import DataError
from tests.report import synthetic
from tests.report.conftest import Profile
from tests.report.test_paper_comparison import table_1

EARLY = {("student", "all"): 100, ("teacher", "all"): 60, ("student", "rare"): 40, ("teacher", "rare"): 20}
SIZES = {"all": 500, "rare": 400, "large": 100}


def record(profile: Profile, name: str = "isd") -> CurveRecord:
    """Two snapshots with chosen counts, and the run's own last scores."""
    found = profile.records().runs[name]
    assert found.own.get("knn") is not None
    early = tuple(
        Score(encoder=encoder, metric="1-NN", group=group, correct=EARLY[encoder, group], n=SIZES[group])  # type: ignore[arg-type]
        for encoder, group in EARLY
    )
    later = tuple(score.model_copy(update={"correct": score.correct + 20}) for score in early)
    return CurveRecord(
        kind="trajectory",
        profile=profile.params.profile,
        run=name,
        protocol="1-NN, 20-NN exact float32, ties by lowest label",
        settings={"k": [1, 20]},
        manifest=found.own["knn"].record.manifest,
        points=(
            CurvePoint(epoch=2, encoder_sha256=synthetic.sha("two"), scores=early),
            CurvePoint(epoch=6, encoder_sha256=synthetic.sha("six"), scores=later),
            CurvePoint(epoch=10, encoder_sha256=synthetic.sha("encoder", name), scores=found.own["knn"].record.scores),
        ),
        provenance=synthetic.provenance(),
    )


def save(profile: Profile, found: CurveRecord) -> None:
    write_record(profile.layout.record(found.run, "trajectory"), found)


def test_points_stand_where_their_numbers_say(profile: Profile) -> None:
    save(profile, record(profile))
    found = learning_curves.of_runs(profile.records())
    assert list(found) == ["isd"]
    drawn = figures.trajectories(profile.params, found, "small")
    assert drawn is not None
    panels = {axes.get_title(): [line.get_xydata().tolist() for line in axes.lines] for axes in drawn.draw().axes}
    student, teacher = panels["All queries"]
    assert student[:2] == [[2, 20.0], [6, 24.0]]
    assert teacher[:2] == [[2, 12.0], [6, 16.0]]
    assert [len(line) for line in panels["Large queries"]] == [1, 1], "the snapshots have no such score"
    assert panels["Rare queries"][0][:2] == [[2, 10.0], [6, 15.0]]


def test_no_record_is_no_figure(profile: Profile) -> None:
    found = learning_curves.of_runs(profile.records())
    assert found == {}
    assert figures.trajectories(profile.params, found, "small") is None


def changed(found: CurveRecord, at: int, **update: object) -> CurveRecord:
    points = list(found.points)
    points[at] = points[at].model_copy(update=update)
    return found.model_copy(update={"points": tuple(points)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.model_copy(update={"run": "moco"}), "run is 'moco', expected 'isd'"),
        (lambda r: r.model_copy(update={"profile": "demo"}), "profile is 'demo'"),
        (lambda r: r.model_copy(update={"manifest": r.manifest.model_copy(update={"sha256": "0"})}), "manifest.sha256 is '0'"),
        (
            lambda r: r.model_copy(update={"points": (r.points[1], r.points[0], r.points[2])}),
            "epochs is [6, 2, 10], expected [2, 6, 10]",
        ),
        (lambda r: r.model_copy(update={"points": r.points[:2]}), "encoder_sha256 is"),
        (lambda r: changed(r, 2, epoch=11), "last epoch is 11, expected 10"),
        (lambda r: changed(r, 2, scores=r.points[1].scores), "last point's scores"),
        (
            lambda r: changed(r, 0, scores=(r.points[0].scores[0].model_copy(update={"correct": 501}),)),
            "epoch 2: scores out of range is ['1-NN']",
        ),
    ],
)
def test_a_record_that_disagrees_is_refused(profile: Profile, change: Callable[[CurveRecord], CurveRecord], words: str) -> None:
    found = change(record(profile))
    write_record(profile.layout.record("isd", "trajectory"), found)
    with pytest.raises(DataError) as caught:
        profile.records()
    assert words in caught.value.message
    assert str(profile.layout.record("isd", "trajectory")) in caught.value.message


def test_the_page_shows_the_figure_and_its_numbers(profile: Profile) -> None:
    assert "Teacher and student over training" not in profile.files()["index.html"]
    save(profile, record(profile))
    files = profile.files()
    assert "![small: 1-NN accuracy by epoch, percent](trajectory-small.svg)" in files["table.md"]
    assert "The paper's" not in html.unescape(files["index.html"])
    cells = {
        (cell["row"], cell["column"]): cell
        for cell in json.loads(files["cells.json"])["cells"]
        if cell["table"] == "trajectory-small"
    }
    early, last = cells["ISD, teacher, all", "2"], cells["ISD, teacher, all", "10"]
    assert (early["value"], early["correct"], early["n"], early["verification"]) == (12.0, 60, 500, "recorded only")
    assert last["verification"] == "recomputed from stored predictions"
    assert early["records"] == ["../records/isd/trajectory.json"]
    assert early["commands"] == ["isd-repro trajectory isd"]
    assert (cells["ISD, student, large", "2"]["value"], cells["ISD, student, large", "2"]["kind"]) == (None, "none")
    assert "| ISD, teacher, all | 12.0\N{DAGGER} |" in files["table.md"]
    assert "12.0" in files["table.tex"].partition("Teacher and student")[2]
    seconds = json.loads(files["cells.json"])["runs"]["isd"]["parts"]["trajectory"]["seconds"]
    assert seconds == synthetic.provenance().seconds


# --- beside the paper's figure ------------------------------------------------------------------------------------------

FIGURE_2 = {"moco-r18": "moco-r18-student", "isd-r18": "isd-r18-teacher"}  # either row stands for both encoders


def beside_the_paper(tmp_path: Path, rows: dict[str, str], **change: Any) -> Profile:
    profile = table_1(tmp_path, **change)
    wanted = profile.params.report.paper[0].model_copy(update={"table": "teacher_student", "rows": rows})
    report = profile.params.report.model_copy(update={"paper": (wanted,)})
    return Profile(profile.params.model_copy(update={"report": report}), profile.layout)


def test_the_papers_curves_are_those_of_the_file_and_called_the_papers(tmp_path: Path) -> None:
    profile = beside_the_paper(tmp_path, FIGURE_2)
    files, table = profile.files(), published().table("teacher_student")
    (shown,) = profile.report().figures
    axes, *_ = shown.draw().axes
    drawn = [(line.get_color(), line.get_ydata().tolist()) for line in axes.lines]
    expected = []
    for method, key, colour in (("MoCo v2", "moco-r18", figures.COLOURS["moco"]), ("ISD", "isd-r18", figures.COLOURS["isd"])):
        for encoder in ("student", "teacher"):
            values = [float(value.printed) for value in table.rows[f"{key}-{encoder}"].values if value]
            expected.append((colour, values))
            start = f"| The paper's {method}, ResNet-18, {encoder} |"
            line = next(one for one in files["table.md"].splitlines() if one.startswith(start))
            assert [cell.strip() for cell in line.split("|")[2:-1]] == [f"{value:.1f}" for value in values]
        assert f">{method} (not run)<" in html.unescape(files["trajectory-whole.svg"])
    assert sorted(drawn) == sorted(expected), "BYOL has no run here to stand beside"
    assert "the paper's Figure 2" in shown.caption
    cells = [cell for cell in json.loads(files["cells.json"])["cells"] if cell["table"] == "trajectory-whole"]
    assert {cell["kind"] for cell in cells} == {"paper", "not run"}
    assert all((cell["paper"] is None) == (cell["value"] is None) for cell in cells)
    assert not [cell for cell in json.loads(files["cells.json"])["cells"] if cell["table"].startswith("paper-teacher")]


@pytest.mark.parametrize(
    "change",
    [
        {"optim": {"epochs": 100}},
        {"backbone": {"arch": "resnet50"}},
        {"rule": {"name": "unbalanced", "large": 2, "rare_images": 5}},
    ],
)
def test_no_curve_of_the_paper_beside_another_protocol(tmp_path: Path, change: dict[str, dict[str, object]]) -> None:
    rule = change.pop("rule", None)
    profile = beside_the_paper(tmp_path, FIGURE_2, **change)
    if rule:
        tree = profile.params.model_dump(mode="json")
        tree["subsets"]["whole"]["rule"] = rule
        profile = Profile(type(profile.params).model_validate(tree), profile.layout)
    assert learning_curves.references(profile.params, profile.records(), "whole") == []
    assert "The paper's ISD" not in html.unescape(profile.files()["index.html"])
