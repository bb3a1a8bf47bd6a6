"""Tables cell by cell: shapes, `not run`, bold, and the pivot against numbers computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.records import EvaluationRecord, pack_labels, score_groups, write_record
from isd_repro.report import pivot, pool
from tests.report import synthetic
from tests.report.conftest import Profile

BALANCED = {"name": "balanced", "per_class": 5}


def test_unbalanced_shape(profile: Profile) -> None:
    student, teacher = profile.report().tables
    heads = [("All (n = 500)", "1-NN"), ("All (n = 500)", "20-NN"), ("Rare (n = 400)", "1-NN"), ("Rare (n = 400)", "20-NN")]
    heads += [("Large (n = 100)", "1-NN"), ("Large (n = 100)", "20-NN")]
    assert [(column.span, column.head) for column in student.columns] == heads
    assert [(column.span, column.head) for column in teacher.columns] == heads
    assert [row.run for row in student.rows] == list(profile.params.runs)
    assert (student.main, teacher.main) == (True, False)
    found = profile.records().runs["moco"].knn
    assert found is not None
    cell = student.rows[2].cells[3]
    score = found.scores["student", "20-NN", "rare"]
    assert (cell.correct, cell.n, cell.value) == (score.correct, score.n, 100 * score.correct / score.n)


def test_not_run_differs_from_no_teacher(profile: Profile) -> None:
    student, teacher = profile.report().tables
    of_student = {row.run: [cell.number for cell in row.cells] for row in student.rows}
    of_teacher = {row.run: [cell.number for cell in row.cells] for row in teacher.rows}
    assert set(of_student["byol"]) == set(of_teacher["byol"]) == {"not run"}
    assert set(of_teacher["pixels"]) == set(of_teacher["untrained"]) == {"\N{EN DASH}"}
    assert not {"not run", "\N{EN DASH}"} & set(of_student["pixels"])


def test_a_pretrained_run_without_evaluation_is_not_run(tmp_path: Path) -> None:
    params = synthetic.profile({"a": ("A", "small"), "b": ("B", "small")}, {"small": BALANCED})
    layout = synthetic.layout(tmp_path, params)
    synthetic.write_run(layout, params, "a", 0.5)
    synthetic.write_run(layout, params, "b", 0.5, parts=["pretrain"], encoders=("student",))
    cells = Profile(params, layout).report().tables[0].rows[1].cells
    assert [cell.number for cell in cells] == ["not run", "not run", "\N{EN DASH}", "\N{EN DASH}"]


@pytest.mark.parametrize("with_linear", [(), ("a",), ("a", "b")])
def test_linear_columns_exist_where_some_run_has_them(tmp_path: Path, with_linear: tuple[str, ...]) -> None:
    params = synthetic.profile({"a": ("A", "small"), "b": ("B", "small")}, {"small": BALANCED})
    layout = synthetic.layout(tmp_path, params)
    for run in ("a", "b"):
        synthetic.write_run(
            layout, params, run, 0.5, parts=("pretrain", "knn", "linear") if run in with_linear else ("pretrain", "knn")
        )
    (table,) = Profile(params, layout).report().tables
    linear = ["linear, last epoch", "linear, best epoch"] if with_linear else []
    assert [column.head for column in table.columns] == ["1-NN", "20-NN", *linear, "1-NN", "20-NN"]
    assert [column.span for column in table.columns] == ["Student"] * (2 + len(linear)) + ["Teacher"] * 2
    cells = [(row.run, at, cell.number) for row in table.rows for at, cell in enumerate(row.cells)]
    missing = {(run, at) for run, at, number in cells if number == "not run"}
    assert missing == ({("b", 2), ("b", 3)} if with_linear == ("a",) else set())
    assert ("Linear protocol: paper." in table.notes) == bool(with_linear)


def test_best_is_the_largest_of_a_column(profile: Profile) -> None:
    for table in profile.report().tables:
        for at in range(len(table.columns)):
            column = [row.cells[at] for row in table.rows]
            values = [cell.value for cell in column if cell.value is not None]
            assert [cell.best for cell in column] == [cell.value == max(values) for cell in column]


def test_a_lone_value_is_not_best(tmp_path: Path) -> None:
    params = synthetic.profile({"a": ("A", "small"), "b": ("B", "small")}, {"small": BALANCED})
    layout = synthetic.layout(tmp_path, params)
    synthetic.write_run(layout, params, "a", 0.5)
    assert not any(cell.best for row in Profile(params, layout).report().tables[0].rows for cell in row.cells)


def write_exact(layout: Layout, params: Params, run: str, right: int, of_large: int) -> None:
    """A 1-NN record of 100 queries, 20 of them large: the first `right` rare and `of_large` large ones are answered rightly."""
    identity = synthetic.manifest(params, params.runs[run].data.subset, 100)
    label = torch.arange(100) % 10
    groups = synthetic.masks(label, identity.large)
    predicted = (label + 1) % 10
    for group, wanted in (("rare", right), ("large", of_large)):
        places = groups[group].nonzero().flatten()[:wanted]
        predicted[places] = label[places]
    record = EvaluationRecord(
        kind="knn",
        profile=params.profile,
        run=run,
        protocol="1-NN, 20-NN exact float32, ties by lowest label",
        settings={"k": [1, 20]},
        manifest=identity,
        encoder_sha256=synthetic.sha(run),
        features_sha256=None,
        scores=tuple(score_groups("student", "1-NN", predicted, label, groups)),
        labels=pack_labels(label),
        predictions={"student/1-NN": pack_labels(predicted)},
        provenance=synthetic.provenance(),
    )
    write_record(layout.record(run, "knn"), record)


def draws(tmp_path: Path) -> tuple[Params, Layout]:
    runs = {
        f"{method}-d{draw}": (f"{label} (D{draw})", f"d{draw}")
        for draw in (1, 2)
        for method, label in (("moco", "MoCo"), ("isd", "ISD"))
    }
    rules = {f"d{draw}": {"name": "list", "list": f"D{draw}"} for draw in (1, 2)}
    params = synthetic.profile(runs, rules, {run: run.split("-")[0] for run in runs})
    params = params.model_copy(update={"evaluation": params.evaluation.model_validate({"knn": {"k": [1]}})})
    return params, synthetic.layout(tmp_path, params)


def test_pivot_of_two_draws_by_hand(tmp_path: Path) -> None:
    """80 rare and 20 large queries. D1: MoCo 40 + 15, ISD 44 + 10. D2: MoCo 50 + 16, ISD 53 + 14."""
    params, layout = draws(tmp_path)
    for run, right, of_large in (("moco-d1", 40, 15), ("isd-d1", 44, 10), ("moco-d2", 50, 16), ("isd-d2", 53, 14)):
        write_exact(layout, params, run, right, of_large)
    (table,) = Profile(params, layout).report().tables
    assert [column.head for column in table.columns] == ["MoCo", "ISD", "Diff"] * 3
    assert [column.span for column in table.columns[::3]] == ["All (n = 100)", "Rare (n = 80)", "Large (n = 20)"]
    values = {row.label: [cell.value for cell in row.cells] for row in (*table.rows, *table.foot)}
    assert values["d1"] == pytest.approx([55, 54, -1, 50, 55, 5, 75, 50, -25])
    assert values["d2"] == pytest.approx([66, 67, 1, 62.5, 66.25, 3.75, 80, 70, -10])
    assert values["Mean"] == pytest.approx([60.5, 60.5, 0, 56.25, 60.625, 4.375, 77.5, 60, -17.5])
    texts = [cell.number for cell in table.foot[0].cells]
    assert texts == ["60.5", "60.5", "0.0", "56.2", "60.6", "+4.4", "77.5", "60.0", "\N{MINUS SIGN}17.5"]
    assert [cell.best for cell in table.rows[0].cells] == [True, False, False, False, True, False, True, False, False]
    assert [cell.best for cell in table.foot[0].cells[:3]] == [True, True, False]
    said = [finding.plain for finding in Profile(params, layout).report().blocks[0].findings]
    assert said[1].startswith(
        "ISD against MoCo, rare (n = 80): +4.4 points on average over 2 of 2 draws (standard deviation 0.9)"
    )
    assert "sign-flip test over all 4 sign vectors p = 0.50, which cannot fall below 0.50 with 2 pairs" in said[1]
    assert said[1].endswith("ISD is ahead on 2, behind on 0.")
    assert [(cell.count, cell.deviation) for cell in table.foot[0].cells[:3]] == [
        (2, pytest.approx(11 / 2**0.5)),
        (2, pytest.approx(13 / 2**0.5)),
        (2, pytest.approx(2 / 2**0.5)),
    ]


def test_pivot_mean_leaves_out_incomplete_draws(tmp_path: Path) -> None:
    params, layout = draws(tmp_path)
    for run, right, of_large in (("moco-d1", 40, 15), ("isd-d1", 44, 10), ("moco-d2", 50, 16)):
        write_exact(layout, params, run, right, of_large)
    (table,) = Profile(params, layout).report().tables
    assert [cell.number for cell in table.rows[1].cells[:3]] == ["66.0", "not run", "not run"]
    assert table.foot[0].label == "Mean (1 of 2)"
    assert [cell.value for cell in table.foot[0].cells[:3]] == pytest.approx([55, 54, -1])


def test_pivot_mean_leaves_out_a_method_that_was_not_run(tmp_path: Path) -> None:
    params, layout = draws(tmp_path)
    for run, right in (("isd-d1", 40), ("isd-d2", 50)):
        write_exact(layout, params, run, right, 10)
    (table,) = Profile(params, layout).report().tables
    assert table.foot[0].label == "Mean"
    assert [cell.number for cell in table.foot[0].cells[:3]] == ["not run", "55.0", "not run"]


def test_difference_counts_the_discordant_queries(tmp_path: Path) -> None:
    params, layout = draws(tmp_path)
    write_exact(layout, params, "moco-d1", 40, 15)
    write_exact(layout, params, "isd-d1", 44, 10)
    (table,) = Profile(params, layout).report().tables
    assert "alone right on 4 against 5, p = 1.00" in table.rows[0].cells[2].detail


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("ISD", "ISD"),
        ("ISD (D1)", "ISD"),
        ("ISD on d1", "ISD"),
        ("ISD, D1", "ISD"),
        ("D1", "D1"),
        ("ISD D10", "ISD D10"),
        ("ISD-d1", "ISD"),
        ("ISD, D1, seed 2", "ISD"),
        ("ISD (seed 12)", "ISD"),
        ("seed 3", "seed 3"),
    ],
)
def test_method_name_is_the_label_without_its_subset(label: str, name: str) -> None:
    params = synthetic.profile({"run": (label, "d1")}, {"d1": BALANCED})
    assert pool.method_name(params, "run") == name


def test_subsets_of_different_kinds_are_not_pivoted() -> None:
    unbalanced = {"name": "unbalanced", "large": 2, "rare_images": 5}
    runs = {f"{method}-{subset}": (method, subset) for method in ("isd", "moco") for subset in ("one", "two", "other")}
    rules = {"one": {**unbalanced, "seed": 0}, "other": BALANCED, "two": {**unbalanced, "seed": 1}}
    assert pivot.families(synthetic.profile(runs, rules)) == [["one", "two"], ["other"]]
    alone = {"isd-one": ("ISD", "one"), "moco-two": ("MoCo", "two")}
    assert pivot.families(synthetic.profile(alone, rules)) == [["one"], ["two"]]


def test_sentences_say_what_beats_what(profile: Profile) -> None:
    """moco (81 %) beats both references, isd (70 %) does not beat raw pixels (76 %)."""
    found = profile.records().runs

    def value(run: str) -> float:
        part = found[run].knn
        assert part is not None
        return part.scores["student", "1-NN", "all"].top1

    said = [finding.plain for finding in profile.report().blocks[0].findings]
    moco, isd, rival = said
    assert moco.startswith(
        f"MoCo v2 {value('moco'):.1f} (1-NN, student): +{value('moco') - value('untrained'):.1f} points over the untrained"
    )
    assert f"+{value('moco') - value('pixels'):.1f} points over raw pixels" in moco
    assert f"\N{MINUS SIGN}{value('pixels') - value('isd'):.1f} points against raw pixels, which it does not beat" in isd
    assert rival.startswith(
        f"ISD against MoCo v2 (1-NN, student): \N{MINUS SIGN}{value('moco') - value('isd'):.1f} points on all queries"
    )


def test_sentences_name_a_reference_that_was_not_run(profile: Profile) -> None:
    profile.layout.record("pixels", "knn").unlink()
    said = [finding.plain for finding in profile.report().blocks[0].findings]
    assert "no comparison with raw pixels, which has not been run" in said[0]


def test_a_record_of_other_parameters_is_told(profile: Profile) -> None:
    run = profile.params.runs["isd"]
    changed = run.model_copy(update={"optim": run.optim.model_copy(update={"lr": 0.1})})
    params = profile.params.model_copy(update={"runs": {**profile.params.runs, "isd": changed}})
    notes = Profile(params, profile.layout).report().footnotes
    assert notes == ("isd was made with other parameters than params.yaml states now: optim.lr was 0.05, is 0.1.",)
    assert profile.report().footnotes == ()
