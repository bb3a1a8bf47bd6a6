"""A stated comparison over draws and the choice among trials, against numbers computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from isd_repro.config import reader as config
from isd_repro.config.params import Hypothesis, Trials
from isd_repro.report import hypothesis, trials
from isd_repro.runtime.errors import ConfigError
from tests.report import synthetic
from tests.report.conftest import Profile

ASKED = {"first": "ISD", "second": "MoCo", "group": "rare", "contradicted_below": 1.0, "draws": 3}
MINUS = "\N{MINUS SIGN}"
ROOT = Path(__file__).parents[2]
T_TWO = 4.302652729911275  # Student's 0.975 quantile with 2 degrees of freedom: sqrt(2) x / sqrt(1 - x^2) with x = 0.95


def write(profile: Profile, run: str, right: dict[str, int]) -> None:
    """A 1-NN record of 10 queries a class, of which so many are answered rightly; classes left out: none."""
    synthetic.write_counts(profile.layout, profile.params, run, right)


def made(
    tmp_path: Path, runs: dict[str, tuple[str, str]], methods: dict[str, str], rules: dict[str, Any], **report: Any
) -> Profile:
    params = synthetic.with_k(synthetic.profile(runs, rules, methods, **report), 1)
    return Profile(params, synthetic.layout(tmp_path, params))


def draws(tmp_path: Path, asked: dict[str, Any] = ASKED, count: int = 3) -> Profile:
    """`count` draws of 10 classes, 2 of them large, with a run of each method."""
    runs = {
        f"{method}-d{at}": (f"{label}, D{at}", f"d{at}")
        for at in range(1, count + 1)
        for method, label in (("moco", "MoCo"), ("isd", "ISD"), ("byol", "Labels"))
    }
    methods = {run: run.split("-")[0].replace("byol", "supervised") for run in runs}
    rules = {f"d{at}": {"name": "list", "list": f"D{at}"} for at in range(1, count + 1)}
    return made(tmp_path, runs, methods, rules, hypothesis=asked)


def rare(profile: Profile) -> list[str]:
    identity = synthetic.manifest(profile.params, "d1", 100)
    return [name for name in identity.classes if name not in identity.large]


def fill(profile: Profile, ours: list[int], theirs: list[int]) -> None:
    """Draw i: the first rare class of ISD has ours[i] right of 10, of MoCo theirs[i]; every other class has 5 of both."""
    first = rare(profile)[0]
    classes = synthetic.manifest(profile.params, "d1", 100).classes
    for at, pair in enumerate(zip(ours, theirs, strict=True), start=1):
        for method, hits in zip(("isd", "moco"), pair, strict=True):
            write(profile, f"{method}-d{at}", {**dict.fromkeys(classes, 5), first: hits})


def test_the_mean_over_draws_and_its_intervals_by_hand(tmp_path: Path) -> None:
    """8 rare classes of 10 queries: one query of one class is 1.25 points. Differences of 8, 6 and 1 queries."""
    profile = draws(tmp_path)
    fill(profile, [10, 9, 6], [2, 3, 5])
    table = profile.report().tables[0]
    assert table.id == "hypothesis"
    row = table.rows[0]
    assert row.label == "Rare, 1-NN, student"
    means = [47.5 + 1.25 * hits - 3.75 for hits in (10, 9, 6)], [47.5 + 1.25 * hits - 3.75 for hits in (2, 3, 5)]
    differences = [10.0, 7.5, 1.25]
    half = T_TWO * stdev(differences) / math.sqrt(3)
    wanted = [fmean(means[0]), fmean(means[1]), 6.25, stdev(differences), 6.25 - half, 6.25 + half]
    assert [cell.value for cell in row.cells[:6]] == pytest.approx(wanted)
    assert [cell.words for cell in row.cells[8:]] == ["3", "0", "0.250"]
    assert {cell.kind for cell in row.cells} == {"statistic"}, "ours, so `verify` has a verdict for each"
    assert {cell.runs for cell in row.cells} == {tuple(f"{method}-d{at}" for at in (1, 2, 3) for method in ("isd", "moco"))}
    # Classes: one has differences of 80, 60 and 10 points, seven have none; drawn k times of 8 the mean is 6.25 k.
    low, high = (row.cells[at].value for at in (6, 7))
    assert low == 0.0  # (7/8)^8 = 0.34 of the resamples draw it never
    assert high in (6.25 * 3, 6.25 * 4)  # P(3 or more) = 0.07, P(4 or more) = 0.011


def test_every_other_key_stands_below(tmp_path: Path) -> None:
    profile = draws(tmp_path)
    fill(profile, [6, 6, 6], [5, 5, 5])
    rows = profile.report().tables[0].rows
    assert [row.label for row in rows] == [f"{group}, 1-NN, student" for group in ("Rare", "All", "Large", "Rare less large")]
    # One of 10 queries of one of 8 rare classes is 1.25 points, and no large one differs.
    assert [cell.value for cell in rows[3].cells[:3]] == pytest.approx([1.25, 0.0, 1.25])


def test_each_class_counts_once_and_is_compared_with_itself() -> None:
    rare, large = {"a": [1.0, 3.0], "b": [0.0], "only rare": [99.0]}, {"a": [1.0], "b": [4.0, 6.0], "only large": [-99.0]}
    assert hypothesis.within_class(rare, large) == [1.0, -5.0]  # a: 2 - 1, b: 0 - 5
    rare, large = {"hard": [10.0, 10.0, 10.0], "easy": [40.0]}, {"hard": [10.0], "easy": [40.0, 40.0, 40.0]}
    assert hypothesis.within_class(rare, large) == [0.0, 0.0], "large classes that are easier are no effect"


def test_the_contrasts_within_classes_are_those_of_the_findings() -> None:
    """Rare less large over 47 classes, of both methods and of their difference, as reports/claim/FINDINGS.md states them."""
    findings = " ".join((ROOT / "reports" / "claim" / "FINDINGS.md").read_text("utf-8").replace(MINUS, "-").split())
    params, layout = config.load(ROOT / "pipelines" / "claim-r" / "params.yaml")
    rows = {row.label: row.cells for row in Profile(params, layout).report().tables[0].rows}
    for metric in ("1-NN", "20-NN"):
        cells = rows[f"Rare less large within 47 classes, {metric}, student"]
        mean, low, high = (cells[at].words.replace(MINUS, "-") for at in (2, 6, 7))
        assert f"{mean} points, 95 % interval {low} to {high}" in findings
    cells = rows["Rare less large within 47 classes, 1-NN, student"]
    assert [cells[at].words for at in (0, 1, 2, 6, 7)] == [f"{MINUS}1.62", f"{MINUS}2.25", "+0.62", f"{MINUS}1.38", "+2.63"]


def test_a_run_decided_after_the_result_is_in_no_mean_and_has_a_table_of_its_own(tmp_path: Path) -> None:
    plain = draws(tmp_path / "plain")
    fill(plain, [10, 9, 6], [2, 3, 5])
    runs = {name: (run.label, run.data.subset) for name, run in plain.params.runs.items()} | {
        "late": ("ISD, another way, D2", "d2")
    }
    methods = {name: run.method.name for name, run in plain.params.runs.items()} | {"late": "isd"}
    rules = {f"d{at}": {"name": "list", "list": f"D{at}"} for at in (1, 2, 3)}
    profile = made(tmp_path / "late", runs, methods, rules, hypothesis=ASKED, exploratory=("late",))
    fill(profile, [10, 9, 6], [2, 3, 5])
    classes = synthetic.manifest(profile.params, "d2", 100).classes
    write(profile, "late", {**dict.fromkeys(classes, 5), rare(profile)[0]: 1})
    report = profile.report()
    before, after = (
        [
            [[cell.value for cell in row.cells] for row in table.rows]
            for table in each.tables
            if "decided after" not in table.title
        ]
        for each in (plain.report(), report)
    )
    assert before == after
    own, differences = [table for table in report.tables if "decided after" in table.title]
    assert [row.label for row in own.rows] == ["MoCo, D2", "ISD, D2", "Labels, D2", "ISD, another way, D2"]
    # of 80 rare queries 1 of the first class is right, against ISD's 9 and MoCo's 3; the other classes alike
    points = {row.label: row.cells[1].number for row in differences.rows}
    assert points == {f"ISD, another way, D2 {MINUS} MoCo": f"{MINUS}2.5", f"ISD, another way, D2 {MINUS} ISD": f"{MINUS}10.0"}


def test_the_pair_of_the_hypothesis_has_one_table(tmp_path: Path) -> None:
    profile = draws(tmp_path)
    fill(profile, [10, 9, 6], [2, 3, 5])
    assert "d1-d3-against-MoCo" not in [table.id for table in profile.report().tables]
    without = profile.params.model_copy(update={"report": profile.params.report.model_copy(update={"hypothesis": None})})
    [table] = [one for one in Profile(without, profile.layout).report().tables if one.id == "d1-d3-against-MoCo"]
    assert table.rows[1].cells[2].words == "+6.25"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([2.0, 2.1, 2.2], "supported"),
        ([0.5, 0.6, 0.7], "supported"),  # above 0, although small
        ([-1.0, 0.0, 0.5], "undecided"),
        ([-2.0, -2.1, -2.2], "contradicted"),
        ([-0.1, 0.0, 0.1], "contradicted"),  # an effect of 1 is excluded
        ([2.0, 2.1], "no verdict"),
    ],
)
def test_the_rule(values: list[float], verdict: str) -> None:
    assert hypothesis.outcome(Hypothesis.model_validate(ASKED), values) == verdict
    secondary = Hypothesis.model_validate({**ASKED, "contradicted_below": None})
    assert hypothesis.outcome(secondary, values) == "no verdict"


def test_the_sentence_follows_the_rule_has_the_profiles_reading_and_leads_the_page(tmp_path: Path) -> None:
    reading = "Reproduced here, at this scale."
    profile = draws(tmp_path, {**ASKED, "readings": {"supported": reading}})
    assert profile.report().blocks[0].findings[0].body == "unknown: none of the 3 draws has runs of both methods."
    fill(profile, [6, 6], [5, 5])
    said = profile.report().blocks[0].findings[0].body
    assert said.startswith("no verdict: +1.25 points on average over 2 of 3 draws")
    assert said.endswith("the rule requires 3 draws or more.")
    fill(profile, [6, 6, 7], [5, 5, 6])
    report = profile.report()
    said = report.blocks[0].findings[0].plain
    assert said.startswith("ISD above MoCo on rare queries (1-NN, student): supported: +1.25 points on average over 3 of 3 draws")
    assert f"over 8 classes. {reading} The rule" in said
    assert report.result.startswith(
        "ISD is 1.25 points above MoCo on rare queries (1-NN, student; mean of 3 draws, 95 % interval "
    )
    assert report.result.endswith(f"); verdict by the stated rule: supported. {reading}")


def test_a_method_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no repeated draws of SimSiam; known: MoCo, ISD and Labels"):
        draws(tmp_path, {**ASKED, "first": "SimSiam"}).report()


def test_methods_with_labels_are_references(tmp_path: Path) -> None:
    profile = draws(tmp_path)
    heads = [column.head for column in profile.report().tables[0].columns]
    assert f"ISD {MINUS} Labels" not in heads


# --- trials -----------------------------------------------------------------------------------------------------------

PLAN = {"first": "isd", "second": "moco", "group": "rare", "classes": 30, "draws": [3, 9]}


def tried(tmp_path: Path, plan: dict[str, Any] | None = PLAN) -> Profile:
    runs = {f"{method}-{at}": (f"{method.upper()}, trial {at}", "d1") for method in ("isd", "moco") for at in (1, 2, 3)}
    methods = {run: run.split("-")[0] for run in runs}
    return made(tmp_path, runs, methods, {"d1": {"name": "list", "list": "D1"}}, trials={"group": "all", "k": 1, "power": plan})


def test_the_best_trial_is_taken_and_the_first_of_equals(tmp_path: Path) -> None:
    profile = tried(tmp_path)
    classes = synthetic.manifest(profile.params, "d1", 100).classes
    first = rare(profile)[0]
    for run, hits in {"isd-1": 5, "isd-2": 6, "isd-3": 6, "moco-1": 5, "moco-2": 4, "moco-3": 3}.items():
        write(profile, run, {**dict.fromkeys(classes, hits), first: hits + 2})
    asked = Trials(group="all", k=1)
    best = trials.chosen(profile.params, profile.records(), asked)
    assert {method: cell.runs for method, cell in best.items()} == {"ISD": ("isd-2",), "MOCO": ("moco-1",)}


def test_seeds_of_one_trial_are_no_trials_of_their_own(tmp_path: Path) -> None:
    """Two seeds of one setting are one trial with their mean; a trial that lacks a seed leaves its method without a choice."""
    runs = {f"isd-{at}-{seed}": (f"ISD, trial {at}, seed {seed}", "d1") for at in (1, 2) for seed in (0, 1)}
    rules: dict[str, dict[str, Any]] = {"d1": {"name": "list", "list": "D1"}}
    profile = made(tmp_path, runs, dict.fromkeys(runs, "isd"), rules, trials={"group": "all", "k": 1})
    for name, run in profile.params.runs.items():
        object.__setattr__(run, "numerics", run.numerics.model_copy(update={"seed": int(name[-1])}))
    classes = synthetic.manifest(profile.params, "d1", 100).classes
    asked = Trials(group="all", k=1)
    for at, hits in {"isd-1-0": 9, "isd-1-1": 3, "isd-2-0": 7, "isd-2-1": 7}.items():
        assert trials.chosen(profile.params, profile.records(), asked) == {}
        write(profile, at, dict.fromkeys(classes, hits))
    best = trials.chosen(profile.params, profile.records(), asked)
    assert {method: (cell.runs, cell.value, cell.count) for method, cell in best.items()} == {
        "ISD": (("isd-2-0", "isd-2-1"), 70.0, 2)
    }
    (taken,) = [table for table in profile.report().tables if table.id == "trials-taken"]
    assert [row.label for row in taken.rows] == ["ISD, trial 2"]


def test_precision_is_foretold_from_the_spread_of_classes(tmp_path: Path) -> None:
    """Eight rare classes, all 10 points apart but one, which is 30: s = 20 / sqrt(8)."""
    profile = tried(tmp_path)
    classes = synthetic.manifest(profile.params, "d1", 100).classes
    first = rare(profile)[0]
    for run in profile.params.runs:
        ours = run.startswith("isd")
        write(profile, run, {**dict.fromkeys(classes, 5 + ours), first: 5 + 3 * ours})
    spread = stdev([30.0, *[10.0] * 7])
    widths = [T_TWO * spread / math.sqrt(30 * 3), 2.306004135204166 * spread / math.sqrt(30 * 9)]
    taken, precision = [table for table in profile.report().tables if table.id in ("trials-taken", "expected-precision")]
    assert [row.label for row in taken.rows] == ["ISD, trial 1", "MOCO, trial 1"]
    assert [cell.value for cell in precision.rows[0].cells] == pytest.approx([spread, *widths])
    assert not [table for table in profile.report().tables if "differences" in table.id], "trials are not compared"
