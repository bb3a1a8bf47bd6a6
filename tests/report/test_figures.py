"""Charts: points stand at their numbers, equal numbers give equal bytes, and names of strangers do no harm."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from isd_repro.config.params import Shots
from isd_repro.data import subsets
from isd_repro.report import figures, intervals, run_records
from isd_repro.report.hypothesis import Comparison, by_class
from isd_repro.report.repetitions import imbalances
from isd_repro.runtime.errors import UserError
from tests.report import synthetic
from tests.report.conftest import ODD, Profile

NAMES = ["_under", "a $b$ $", '<c> & "d" \'', "e\x07\u202e", "f" * 80]
TSNE = {
    "encoder": "student",
    "classes": NAMES,
    "class_of_point": [0, 1, 2, 3, 4, 0],
    "panels": [{"epoch": None, "neighbours": 50.0, "points": [[0, 1], [2, 5], [1, 1], [3, 3], [4, 0], [5, 2]]}],
}


def dots(axes: Any) -> list[list[tuple[float, float]]]:
    """Points of each scatter of a panel."""
    return [[tuple(point) for point in found.get_offsets().tolist()] for found in axes.collections]


def test_losses_are_drawn_where_they_are(profile: Profile) -> None:
    drawn = figures.losses(profile.params, profile.records())
    assert drawn is not None
    panels = {axes.get_title(): axes for axes in drawn.draw().axes}
    assert list(panels) == ["Untrained", "Raw pixels", "MoCo v2", "ISD"]
    record = profile.records().runs["isd"].pretrain
    assert record is not None
    (line,) = panels["ISD"].lines
    assert line.get_xydata().tolist() == [[row["epoch"], row["loss"]] for row in record.curve]
    assert line.get_color() == figures.COLOURS["isd"]


def test_scores_stand_at_their_values_and_intervals(profile: Profile) -> None:
    drawn = figures.scores(profile.params, profile.records(), ["small"])
    assert drawn is not None
    axes = drawn.draw().axes
    assert [panel.get_title() for panel in axes] == ["All queries", "Rare queries", "Large queries"]
    known = [(row.label, row.cells[0]) for row in profile.report().tables[0].rows if row.cells[0].value is not None]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [label for label, _ in known]
    assert dots(axes[0]) == [[(pytest.approx(cell.value), at)] for at, (_, cell) in enumerate(known)]
    ends = [list(line.get_xdata()) for line in axes[0].lines]
    assert ends == [[pytest.approx(cell.low), pytest.approx(cell.high)] for _, cell in known]


def test_a_class_has_a_bar_at_its_gain_and_the_largest_comes_first(profile: Profile) -> None:
    records = profile.records()
    drawn = figures.class_gains(profile.params, records, ["small"], "ISD", "MoCo v2")
    assert drawn is not None
    heights = [bar.get_height() for bar in drawn.draw().axes[0].patches]
    assert heights == sorted(heights, reverse=True)
    sides = [by_class(records, [run], ("student", "1-NN", "all")) for run in ("isd", "moco")]
    assert sorted(heights) == pytest.approx(sorted(sides[0][name] - sides[1][name] for name in sides[0]))


def test_accuracy_stands_against_the_training_images_of_a_class(profile: Profile) -> None:
    """Two large classes share what the eight rare ones with 30 images each leave of 1,040 images."""
    records = profile.records()
    drawn = figures.class_accuracy(profile.params, records, ["small"])
    assert drawn is not None
    (axes,) = drawn.draw().axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[30, 400]] * 4
    by_name = by_class(records, ["isd"], ("student", "1-NN", "all"))
    rare = [by_name[name] for name in by_name if name not in synthetic.LARGE]
    assert axes.lines[-1].get_ydata()[0] == pytest.approx(sum(rare) / 8)
    assert len(dots(axes)[-1]) == 10


def test_training_images_are_those_that_the_rule_draws() -> None:
    rule = {"name": "exponential", "imbalance": 100.0, "max_per_class": 500}
    params = synthetic.profile({"isd": ("ISD", "lt")}, {"lt": rule})
    manifest = synthetic.manifest(params, "lt", 100)
    sizes = subsets.exponential_sizes(10, 500, 100.0)
    assert figures.training_images(manifest) == dict(zip(synthetic.CLASSES, sizes, strict=True))
    drawn = manifest.model_copy(update={"rule": {**manifest.rule, "order": "draw"}})
    assert figures.training_images(drawn) == {}, "the manifest does not say which class was drawn first"


@pytest.mark.parametrize(("few", "cells"), [(20, 100), (9, 6)])
def test_answers_are_shown_by_class_and_by_group_where_there_are_many(
    profile: Profile, few: int, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "FEW_CLASSES", few)
    drawn = figures.confusions(profile.params, profile.records(), ["small"], "ISD", "MoCo v2")
    assert drawn is not None
    ours, theirs = drawn.draw().axes
    assert (ours.get_title(), theirs.get_title()) == ("ISD", "MoCo v2")
    shares = [list(row) for row in ours.collections[0].get_array()]
    assert sum(map(len, shares)) == cells
    assert list(map(sum, shares)) == pytest.approx([1] * len(shares))
    right = by_class(profile.records(), ["isd"], ("student", "1-NN", "all"))
    if few == 20:
        assert [100 * shares[at][at] for at in range(10)] == pytest.approx([right[f"c{at}"] for at in range(10)])
    else:
        assert 100 * shares[0][-1] == pytest.approx((right["c0"] + right["c1"]) / 2)


def test_differences_show_every_draw_their_mean_its_interval_and_the_rule() -> None:
    draws = {"d1": 1.0, "d2": 3.0, "d3": 2.5}
    one = Comparison(("student", "1-NN", "rare"), draws, 50.0, 48.0, {}, ())
    drawn = figures.differences([one], "ISD", "MoCo v2", 0.5)
    (axes,) = drawn.draw().axes
    first, mean = dots(axes)
    assert [x for x, _ in first] == list(draws.values())
    assert mean[0][0] == pytest.approx(sum(draws.values()) / 3)
    interval, zero, rule = axes.lines
    assert tuple(interval.get_xdata()) == pytest.approx(intervals.student_interval(list(draws.values())))
    assert (zero.get_xdata()[0], rule.get_xdata()[0]) == (0, 0.5)
    assert "+0.5" in drawn.caption
    assert "rule" not in figures.differences([one], "ISD", "MoCo v2", None).caption


def test_accuracy_against_imbalance_has_a_line_a_method_and_a_dot_a_run(tmp_path: Path) -> None:
    rules = {f"r{imbalance}": {"name": "exponential", "imbalance": imbalance} for imbalance in (10, 100)}
    runs = {f"{name}-{subset}-{seed}": (f"{name} on {subset}", subset) for subset in rules for name in "ab" for seed in (1, 2)}
    params = synthetic.profile(runs, rules)
    for name, run in params.runs.items():
        numerics = run.numerics.model_copy(update={"seed": int(name[-1])})
        params.runs[name] = run.model_copy(update={"numerics": numerics})
    layout = synthetic.layout(tmp_path, params)
    for at, name in enumerate(params.runs):
        synthetic.write_counts(layout, params, name, {"all": 40 + at})
    [series] = imbalances(params)
    assert series == {"r10": 10, "r100": 100}
    drawn = figures.by_imbalance(params, run_records.load(params, layout), series)
    assert drawn is not None
    accuracy, balancedness = drawn.draw().axes
    lines = [list(zip(*line.get_data(), strict=True)) for line in accuracy.lines]
    assert lines == [[(10, 40.5), (100, 44.5)], [(10, 42.5), (100, 46.5)]]
    assert dots(accuracy) == [[(10, 40), (10, 41), (100, 44), (100, 45)], [(10, 42), (10, 43), (100, 46), (100, 47)]]
    even, one_more = dots(balancedness)[0][:2]  # 4 of 10 queries of each class, and 5 of one class
    assert (even, one_more) == ((10, pytest.approx(0)), (10, pytest.approx(3)))
    assert "Many" not in drawn.caption
    assert imbalances(synthetic.profile({"a": ("a", "x")}, {"x": rules["r10"]})) == []


def test_groups_by_training_images_have_panels_of_their_own(tmp_path: Path) -> None:
    rules = {f"r{imbalance}": {"name": "exponential", "imbalance": imbalance} for imbalance in (10, 100)}
    params = synthetic.profile({f"a-{subset}": (f"a on {subset}", subset) for subset in rules}, rules)
    for name, subset in params.subsets.items():
        params.subsets[name] = subset.model_copy(update={"shots": Shots()})
    layout = synthetic.layout(tmp_path, params)
    for run, right in {"a-r10": 3, "a-r100": 6}.items():
        synthetic.write_counts(layout, params, run, {"medium": right})  # of 30 queries of three classes
    drawn = figures.by_imbalance(params, run_records.load(params, layout), {"r10": 10, "r100": 100})
    assert drawn is not None
    panels = {axes.get_title().partition(" queries")[0]: dots(axes)[0] for axes in drawn.draw().axes}
    assert list(panels) == ["All", "Many", "Medium", "Few", "Balancedness, points"]
    assert panels["Medium"] == [(10, pytest.approx(10)), (100, pytest.approx(20))]
    assert "at another imbalance a group has other classes" in drawn.caption


def test_a_chart_has_the_same_bytes_whatever_the_settings_of_the_user(profile: Profile) -> None:
    drawn = profile.report().figures
    first = {figure.name: figure.svg() for figure in drawn}
    assert set(first) == {"scores-small", "classes-small", "sizes-small", "confusions-small", "loss-curves"}
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path", "axes.grid": False}):
        assert {figure.name: figure.svg() for figure in drawn} == first
    for text in first.values():
        assert "20" not in text[: text.index("<g")].partition("<metadata")[2], "no date"
        assert "currentColor" in text
        assert figures.INK not in text


def test_names_of_strangers_are_text(profile: Profile) -> None:
    root = ET.fromstring(figures.embedding(TSNE).svg())
    shown = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert shown[1:] == ["_under", "a $b$ $", '<c> & "d" \'', "e", "f" * 33 + "\N{HORIZONTAL ELLIPSIS}"]
    assert len(dots(figures.embedding(TSNE).draw().axes[0])[0]) == 6
    assert ODD not in "".join(figure.svg() for figure in profile.report().figures)


def test_a_method_has_one_colour_that_can_be_seen_on_both_grounds(profile: Profile) -> None:
    runs = profile.params.runs
    assert figures.colour(runs["isd"]) == figures.COLOURS["isd"]
    assert figures.colour(runs["isd"].model_copy(update={"label": "another"})) == figures.COLOURS["isd"]
    untrained = runs["isd"].model_copy(update={"optim": runs["isd"].optim.model_copy(update={"epochs": 0})})
    assert figures.colour(untrained) == figures.UNTRAINED
    new = runs["isd"].model_copy(update={"method": runs["isd"].method.model_copy(update={"name": "mean_shift"})})
    assert figures.colour(new) in figures.OTHERS

    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in (*figures.COLOURS.values(), *figures.OTHERS, figures.UNTRAINED):
        assert 1.05 / (luminance(colour) + 0.05) >= 3, f"{colour} on white"
        assert (luminance(colour) + 0.05) / (luminance("#16191d") + 0.05) >= 3, f"{colour} on dark"


def test_a_missing_matplotlib_is_named(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = profile.report().figures[0]
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib") as caught:
        drawn.svg()
    assert "isd-repro[report]" in caught.value.hint
