"""Tables cell by cell: shapes, `not run`, bold, differences, and draws against numbers computed by hand."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from isd_repro.config.params import Params, Shots
from isd_repro.report import repetitions
from isd_repro.report.cells import Table
from tests.report import synthetic
from tests.report.conftest import Profile

BALANCED = {"name": "balanced", "per_class": 5}
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def named(profile: Profile, name: str) -> Table:
    [found] = [table for table in profile.report().tables if table.id == name]
    return found


def two_runs(tmp_path: Path) -> Profile:
    params = synthetic.profile({"a": ("A", "small"), "b": ("B", "small")}, {"small": BALANCED})
    return Profile(params, synthetic.layout(tmp_path, params))


def test_unbalanced_shape(profile: Profile) -> None:
    student, teacher = named(profile, "small-student"), named(profile, "small-teacher")
    groups = ("All (n = 500)", "Rare (n = 400)", "Large (n = 100)")
    heads = [(group, metric) for group in groups for metric in ("1-NN", "20-NN")]
    heads += [("Balancedness", metric) for metric in ("1-NN", "20-NN")]
    for table in (student, teacher):
        assert [(column.span, column.head) for column in table.columns] == heads
    assert [row.run for row in student.rows] == list(profile.params.runs)
    assert (student.main, teacher.main) == (True, False)
    found = profile.records().runs["moco"].own.get("knn")
    assert found is not None
    cell, score = student.rows[2].cells[3], found.scores["student", "20-NN", "rare"]
    assert (cell.correct, cell.n, cell.value) == (score.correct, score.n, 100 * score.correct / score.n)


def test_not_run_differs_from_no_teacher(profile: Profile) -> None:
    student, teacher = (
        {row.run: {cell.number for cell in row.cells} for row in named(profile, f"small-{encoder}").rows}
        for encoder in ("student", "teacher")
    )
    assert student["byol"] == teacher["byol"] == {"not run"}
    assert teacher["pixels"] == teacher["untrained"] == {DASH}
    assert not {"not run", DASH} & student["pixels"]


@pytest.mark.parametrize("with_linear", [(), ("a",), ("a", "b")])
def test_linear_columns_exist_where_some_run_has_them(tmp_path: Path, with_linear: tuple[str, ...]) -> None:
    profile = two_runs(tmp_path)
    for run in ("a", "b"):
        parts = ("pretrain", "knn", "linear") if run in with_linear else ("pretrain", "knn")
        synthetic.write_run(profile.layout, profile.params, run, 0.5, parts=parts)  # type: ignore[arg-type]
    table = named(profile, "small")
    linear = ["linear, last epoch", "linear, best epoch"] if with_linear else []
    assert [column.head for column in table.columns] == ["1-NN", "20-NN", *linear, "1-NN", "20-NN"]
    assert [column.span for column in table.columns] == ["Student"] * (2 + len(linear)) + ["Teacher"] * 2
    missing = {(row.run, at) for row in table.rows for at, cell in enumerate(row.cells) if cell.number == "not run"}
    assert missing == ({("b", 2), ("b", 3)} if with_linear == ("a",) else set())
    assert ("Linear protocol: paper." in table.notes) == bool(with_linear)


def test_best_is_the_largest_of_a_column_and_a_lone_value_is_not_best(profile: Profile, tmp_path: Path) -> None:
    for name in ("small-student", "small-teacher"):
        for column in zip(*(row.cells for row in named(profile, name).rows), strict=True):
            most = max(cell.value for cell in column if cell.value is not None)
            accuracy = not any(cell.kind == "statistic" for cell in column)  # of balancedness less is better, and none is marked
            assert [cell.best for cell in column] == [accuracy and cell.value == most for cell in column]
    alone = two_runs(tmp_path / "alone")
    synthetic.write_run(alone.layout, alone.params, "a", 0.5, parts=["pretrain"], encoders=("student",))
    synthetic.write_run(alone.layout, alone.params, "b", 0.5)
    rows = named(alone, "small").rows
    assert not any(cell.best for row in rows for cell in row.cells)
    assert [cell.number for cell in rows[0].cells] == ["not run", "not run", DASH, DASH]


def test_differences_say_how_many_runs_are_behind_them(profile: Profile) -> None:
    """Methods less both references, then ISD less MoCo; no p over queries is printed for one pair of trainings."""
    table, found = named(profile, "small-differences"), profile.records().runs

    def value(run: str, group: str) -> float:
        part = found[run].own["knn"]
        assert part is not None
        return part.scores["student", "1-NN", group].top1

    labels = [f"MoCo v2 {MINUS} untrained encoder", f"MoCo v2 {MINUS} raw pixels"]
    labels += [f"ISD {MINUS} untrained encoder", f"ISD {MINUS} raw pixels", f"ISD {MINUS} MoCo v2"]
    assert [row.label for row in table.rows] == labels
    *differences, first, second = table.rows[-1].cells
    for cell, group in zip(differences, ("all", "rare", "large"), strict=True):
        assert cell.value == pytest.approx(value("isd", group) - value("moco", group))
        assert "p =" not in cell.plain + cell.detail
        assert "one training of each, so their variation is unknown; queries only the first classifies correctly:" in cell.detail
    assert (first.words, second.words) == ("1", "1")
    assert "differences have no intervals" in table.notes[1]
    assert named(profile, "small-student").first == "Run (one seed each)"


# --- draws ------------------------------------------------------------------------------------------------------------


def draws(tmp_path: Path, right: dict[str, tuple[int, int]]) -> Profile:
    """MoCo and ISD on two draws of 80 rare and 20 large queries, of which so many are answered rightly."""
    runs = {f"{name.lower()}-d{at}": (f"{name} (D{at})", f"d{at}") for at in (1, 2) for name in ("MoCo", "ISD")}
    rules = {f"d{at}": {"name": "list", "list": f"D{at}"} for at in (1, 2)}
    params = synthetic.with_k(synthetic.profile(runs, rules, {run: run.split("-")[0] for run in runs}), 1)
    layout = synthetic.layout(tmp_path, params)
    for run, (rare, large) in right.items():
        synthetic.write_counts(layout, params, run, {"rare": rare, "large": large})
    return Profile(params, layout)


BOTH = {"moco-d1": (40, 15), "isd-d1": (44, 10), "moco-d2": (50, 16), "isd-d2": (53, 14)}


def test_draws_by_hand(tmp_path: Path) -> None:
    profile = draws(tmp_path, BOTH)
    table, pair = profile.report().tables
    assert [column.head for column in table.columns] == ["MoCo", "ISD", "Diff"] * 3
    assert [column.span for column in table.columns[::3]] == ["All (n = 100)", "Rare (n = 80)", "Large (n = 20)"]
    values = {row.label: [cell.value for cell in row.cells] for row in (*table.rows, *table.foot)}
    assert values["d1"] == pytest.approx([55, 54, -1, 50, 55, 5, 75, 50, -25])
    assert values["d2"] == pytest.approx([66, 67, 1, 62.5, 66.25, 3.75, 80, 70, -10])
    assert values["Mean"] == pytest.approx([60.5, 60.5, 0, 56.25, 60.625, 4.375, 77.5, 60, -17.5])
    assert [cell.number for cell in table.foot[0].cells[3:6]] == ["56.2", "60.6", "+4.4"]
    assert [cell.best for cell in table.rows[0].cells] == [True, False, False, False, True, False, True, False, False]
    assert [cell.best for cell in table.foot[0].cells[:3]] == [True, True, False]
    assert [(cell.count, cell.deviation) for cell in table.foot[0].cells[:2]] == [
        (2, pytest.approx(11 / 2**0.5)),
        (2, pytest.approx(13 / 2**0.5)),
    ]
    assert "only the first classifies correctly: 4, only the second: 5" in table.rows[0].cells[2].detail
    rare = pair.rows[1]
    assert rare.label == "Rare, 1-NN, student"
    assert [cell.words for cell in rare.cells[2:4]] == ["+4.38", "0.88"]
    assert [cell.words for cell in rare.cells[-3:]] == ["2", "0", "0.500"]


@pytest.mark.parametrize(
    ("missing", "label", "means"),
    [
        (("isd-d2",), "Mean (1 of 2)", ["55.0", "54.0", f"{MINUS}1.0"]),  # a draw that lacks a method is left out
        (("moco-d1", "moco-d2"), "Mean", ["not run", "60.5", "not run"]),  # a method without any run is left out
    ],
)
def test_means_are_over_complete_draws(tmp_path: Path, missing: tuple[str, ...], label: str, means: list[str]) -> None:
    table = draws(tmp_path, {run: right for run, right in BOTH.items() if run not in missing}).report().tables[0]
    assert (table.foot[0].label, [cell.number for cell in table.foot[0].cells[:3]]) == (label, means)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("ISD", "ISD"),
        ("ISD (D1)", "ISD"),
        ("ISD on d1", "ISD"),
        ("ISD-d1", "ISD"),
        ("D1", "D1"),
        ("ISD D10", "ISD D10"),
        ("ISD, D1, seed 2", "ISD"),
        ("seed 3", "seed 3"),
    ],
)
def test_method_name_is_the_label_without_subset_and_seed(label: str, name: str) -> None:
    params = synthetic.profile({"run": (label, "d1")}, {"d1": BALANCED})
    assert repetitions.method_name(params, "run") == name


def test_subsets_of_different_kinds_are_no_family() -> None:
    unbalanced = {"name": "unbalanced", "large": 2, "rare_images": 5}
    runs = {f"{method}-{subset}": (method, subset) for method in ("isd", "moco") for subset in ("one", "two", "other")}
    rules = {"one": {**unbalanced, "seed": 0}, "other": BALANCED, "two": {**unbalanced, "seed": 1}}
    assert repetitions.families(synthetic.profile(runs, rules)) == [["one", "two"], ["other"]]
    alone = {"isd-one": ("ISD", "one"), "moco-two": ("MoCo", "two")}
    assert repetitions.families(synthetic.profile(alone, rules)) == [["one"], ["two"]]


# --- seeds ------------------------------------------------------------------------------------------------------------


def seeded(tmp_path: Path, right: dict[int, int]) -> Profile:
    """ISD under several seeds on one subset, MoCo under one; the number right of 1,000 by seed."""
    runs = {"moco": ("MoCo", "whole"), **{f"isd-s{seed}": (f"ISD, seed {seed}", "whole") for seed in right}}
    tree = synthetic.profile(runs, {"whole": {"name": "all"}}, {"moco": "moco"}).model_dump(mode="json")
    for seed in right:
        tree["runs"][f"isd-s{seed}"]["numerics"]["seed"] = seed
    params = Params.model_validate(tree)
    layout = synthetic.layout(tmp_path, params)
    for run, correct in {"moco": 390, **{f"isd-s{seed}": correct for seed, correct in right.items()}}.items():
        synthetic.write_counts(layout, params, run, {"all": correct}, queries=1000)
    return Profile(params, layout)


def test_seeds_have_a_row_of_their_mean(tmp_path: Path) -> None:
    """40, 41 and 45 percent: mean 42, deviation sqrt((4 + 1 + 9) / 2)."""
    profile = seeded(tmp_path, {0: 400, 1: 410, 2: 450})
    table = named(profile, "whole")
    assert [row.label for row in table.rows] == ["MoCo", "ISD, seed 0", "ISD, seed 1", "ISD, seed 2"]
    (foot,) = table.foot
    mean = foot.cells[0]
    assert (foot.label, mean.value, mean.count, mean.deviation) == ("ISD, 3 seeds", pytest.approx(42), 3, pytest.approx(7**0.5))
    assert mean.runs == ("isd-s0", "isd-s1", "isd-s2")
    assert mean.plain == "42.0 (s.d. 2.6, n = 3)"
    [row] = named(profile, "whole-differences").rows
    assert [cell.number for cell in row.cells] == ["+3.0", "3", "1"]
    profile.layout.record("isd-s2", "knn").unlink()
    mean = named(profile, "whole").foot[0].cells[0]
    assert (mean.value, mean.count, mean.runs) == (pytest.approx(40.5), 2, ("isd-s0", "isd-s1")), "what no run gave needs no run"
    [row] = named(profile, "whole-differences").rows
    assert [cell.runs for cell in row.cells[1:]] == [("isd-s0", "isd-s1"), ("moco",)]
    assert "1 more not run" in mean.detail


def test_runs_that_differ_in_more_than_the_seed_are_not_repetitions(tmp_path: Path) -> None:
    params = seeded(tmp_path, {0: 400, 1: 410}).params
    assert repetitions.repetitions(params, list(params.runs)) == [["moco"], ["isd-s0", "isd-s1"]]
    tree = params.model_dump(mode="json")
    tree["runs"]["isd-s1"]["optim"]["lr"] = 0.06
    assert repetitions.repetitions(Params.model_validate(tree), ["isd-s0", "isd-s1"]) == [["isd-s0"], ["isd-s1"]]


def test_a_record_of_other_parameters_is_told(profile: Profile) -> None:
    run = profile.params.runs["isd"]
    changed = run.model_copy(update={"optim": run.optim.model_copy(update={"lr": 0.1})})
    params = profile.params.model_copy(update={"runs": {**profile.params.runs, "isd": changed}})
    notes = Profile(params, profile.layout).report().footnotes
    assert notes == ("isd was made with parameters that differ from the current params.yaml: optim.lr was 0.05, is 0.1.",)
    assert profile.report().footnotes == ()


# --- groups by training images, and balancedness ------------------------------------------------------------------------


def long_tailed(tmp_path: Path, runs: int = 2) -> Profile:
    """Seeds of one method on a subset with 1 class of many, 3 of a medium number of and 6 of few training images."""
    rule = {"name": "exponential", "imbalance": 100}
    params = synthetic.profile({f"a-s{at}": (f"A, seed {at}", "lt") for at in range(runs)}, {"lt": rule})
    for at, (name, run) in enumerate(params.runs.items()):
        params.runs[name] = run.model_copy(update={"numerics": run.numerics.model_copy(update={"seed": at})})
    params.subsets["lt"] = params.subsets["lt"].model_copy(update={"shots": Shots(many_above=1000, few_below=200)})
    return Profile(params, synthetic.layout(tmp_path, params))


def test_groups_by_training_images_have_columns_and_their_thresholds_a_note(tmp_path: Path) -> None:
    found = long_tailed(tmp_path)
    before = named(found, "lt-student")
    assert [column.span for column in before.columns[::2]] == ["All", "Many", "Medium", "Few", "Balancedness"]
    for name in found.params.runs:
        synthetic.write_counts(found.layout, found.params, name, {"many": 8, "few": 12})
    table = named(found, "lt-student")
    spans = [column.span for column in table.columns if column.head == "1-NN"]
    assert spans == ["All (n = 100)", "Many (n = 10)", "Medium (n = 30)", "Few (n = 60)", "Balancedness"]
    cells = [cell for column, cell in zip(table.columns, table.rows[0].cells, strict=True) if column.head == "1-NN"]
    assert [cell.number for cell in cells[:4]] == ["20.0", "80.0", "0.0", "20.0"]
    assert any("more than 1,000 and with fewer than 200 training images" in note for note in table.notes)


def test_balancedness_is_the_deviation_over_classes_and_has_no_best(tmp_path: Path) -> None:
    """Of ten classes one has 8 of 10 queries right, six have 2 and three none; the other run has 5 in every class."""
    found = long_tailed(tmp_path)
    synthetic.write_counts(found.layout, found.params, "a-s0", {"many": 8, "few": 12})
    synthetic.write_counts(found.layout, found.params, "a-s1", {"all": 50})
    table = named(found, "lt-student")
    at = [(column.span, column.head) for column in table.columns].index(("Balancedness", "1-NN"))
    first, second = (row.cells[at] for row in table.rows)
    assert first.value == pytest.approx(statistics.pstdev([80, *[20] * 6, *[0] * 3]))
    assert second.value == pytest.approx(0)
    assert (first.best, second.best) == (False, False)
    assert first.kind == second.kind == "statistic"
    [mean] = table.foot
    assert (mean.cells[at].value, mean.cells[at].count) == (pytest.approx((first.value or 0) / 2), 2)
    assert any("standard deviation over classes" in note for note in table.notes)


def test_balancedness_needs_predictions(tmp_path: Path) -> None:
    found = long_tailed(tmp_path, runs=1)
    synthetic.write_counts(found.layout, found.params, "a-s0", {"all": 50}, stored=False)
    table = named(found, "lt-student")
    at = [(column.span, column.head) for column in table.columns].index(("Balancedness", "1-NN"))
    cell = table.rows[0].cells[at]
    assert (cell.value, cell.kind, cell.detail) == (None, "none", "the record has no predictions")


def test_the_result_is_told_of_all_and_of_few_shot_queries(tmp_path: Path) -> None:
    rule = {"name": "exponential", "imbalance": 100}
    params = synthetic.profile({"isd": ("ISD", "lt"), "moco": ("MoCo v2", "lt")}, {"lt": rule}, {"moco": "moco"})
    params.subsets["lt"] = params.subsets["lt"].model_copy(update={"shots": Shots(many_above=1000, few_below=200)})
    found = Profile(params, synthetic.layout(tmp_path, params))
    for name, few in (("isd", 30), ("moco", 12)):
        synthetic.write_counts(found.layout, params, name, {"many": 8, "few": few})
    assert "38.0 % and 20.0 % on all queries and 50.0 % and 20.0 % on few-shot queries" in found.report().result
