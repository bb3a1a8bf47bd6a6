"""The claim's second protocol: runs differ as it says, the gate decides by its rules."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from isd_repro.config import params, reader

ROOT = Path(__file__).parents[2]


def loaded(name: str) -> ModuleType:
    path = ROOT / "reports" / "claim-2" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded("make_profiles")


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    return loaded("gate")


@pytest.fixture(scope="module")
def tuning() -> ModuleType:
    return loaded("tuning")


@pytest.fixture(scope="module")
def confirm() -> ModuleType:
    return loaded("confirm")


def test_the_design_pairs_settings_evenly(script: ModuleType) -> None:
    points = script.points()
    pairs = [("view_teacher", "bank_over_images"), ("view_teacher", "dim"), ("weight_decay", "bank_over_images")]
    for one, other in pairs:
        assert set(Counter((point[one], point[other]) for point in points).values()) == {2}
    assert len({point["momentum"] for point in points}) == 5


def runs_of(profile: str) -> dict[str, params.Run]:
    return reader.load(ROOT / "pipelines" / profile / "params.yaml")[0].runs


def test_cells_of_a_point_differ_in_loss_and_heads_alone() -> None:
    runs = runs_of("claim-2-tuning")
    for point in range(1, 13):
        isd, soft, hard, moco = (runs[f"{cell}-{point:02d}"] for cell in ("isd", "soft", "hard", "moco"))
        for one, other in itertools.combinations((isd, soft, hard, moco), 2):
            assert (one.backbone, one.optim, one.data, one.numerics) == (other.backbone, other.optim, other.data, other.numerics)
        assert isd.method.options | {"heads": "moco"} == soft.method.options
        assert hard.method.options | {"heads": "moco"} == moco.method.options
        assert isd.method.options["tau_student"] == moco.method.options["tau"]
        for key in ("dim", "momentum", "bank_size"):
            assert isd.method.options[key] == moco.method.options[key]


def test_runs_of_a_pair_differ_in_what_is_compared_alone() -> None:
    runs = runs_of("claim-2-gate")

    def fields(name: str) -> dict[str, object]:
        return runs[name].model_dump(exclude={"label"})

    for name in ("moco-unbalanced-9", "isd-unbalanced-9", "moco-balanced-10"):
        half, full = fields(name), fields(f"{name}-float32")
        assert half["numerics"] | {"precision": "float32"} == full["numerics"]  # type: ignore[operator]
        assert {**half, "numerics": None} == {**full, "numerics": None}
    for number, again in itertools.product((9, 10), ("", "-again")):
        cut, even = fields(f"moco-unbalanced-{number}{again}-float32"), fields(f"moco-balanced-{number}{again}-float32")
        assert cut["data"] | {"subset": f"s{number}-balanced"} == even["data"]  # type: ignore[operator]
        assert {**cut, "data": None} == {**even, "data": None}
    for name in ("moco-unbalanced-9", "moco-balanced-9", "isd-unbalanced-9"):
        strided, full = fields(f"{name}-strided"), fields(f"{name}-float32")
        assert strided["backbone"] == full["backbone"] | {"stem": "strided"}  # type: ignore[operator]
        assert {**strided, "backbone": None} == {**full, "backbone": None}


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_the_page_of_the_gate_is_that_of_the_records(gate: ModuleType) -> None:
    page = (ROOT / "reports" / "claim-2" / "gate.md").read_text("utf-8")
    assert page == gate.render(gate.read(gate.PROFILE, gate.METRIC)), "run python reports/claim-2/gate.py"


@pytest.mark.parametrize(
    ("scores", "stds", "expected"),
    [
        ((-3.0, -2.9, 1.5), (0.9, 0.95, 1.1), "bf16"),  # -1.4667 on average, and 0.9 of the twin's is not below
        ((-3.0, -3.0, 1.5), (1.0, 1.0, 1.0), "float32"),  # -1.5 is not above
        ((2.0, 2.0, 2.0), (1.0, 0.89, 1.0), "float32"),
    ],
)
def test_precision_is_that_of_the_rule(
    gate: ModuleType, scores: tuple[float, ...], stds: tuple[float, ...], expected: str
) -> None:
    """The twins score 20 in one class and 40 in the other, with embedding std 1."""
    twin = gate.Run({"a": 20.0, "b": 40.0}, {}, {}, 1.0)
    pairs = [(gate.Run({"a": 20.0, "b": 40.0 + 2 * points}, {}, {}, std), twin) for points, std in zip(scores, stds, strict=True)]
    assert gate.precision(pairs) == expected


def rare(gate: ModuleType, *values: float) -> tuple[object, object]:
    """A balanced and an unbalanced run, which differ by `values` in the rare classes."""
    names = [f"n{at}" for at in range(len(values))]
    unbalanced = {name: 10.0 + at for at, name in enumerate(names)}
    balanced = {name: unbalanced[name] + value for name, value in zip(names, values, strict=True)}
    return gate.Run(balanced, balanced, {"big": 1.0}), gate.Run(unbalanced, unbalanced, {"big": 1.0})


def test_imbalance_is_judged_over_classes_with_their_seeds_averaged(gate: ModuleType) -> None:
    first = [rare(gate, 4.0, 1.0), rare(gate, 0.0, 3.0)]  # 2 and 2 on average
    second = [rare(gate, 6.0, 1.0), rare(gate, -4.0, 1.0)]  # 1 and 1
    found = gate.imbalance([first, second])
    assert found.differences == (2.5, 1.5, 3.5, -1.5)
    assert (found.classes, found.mean) == (4, 1.5)
    half = 3.182446305284263 * math.sqrt(1 / 3) / 2  # t(0.975, 3) s / sqrt(4), with s of 2, 2, 1, 1
    assert (found.low, found.high) == (pytest.approx(1.5 - half), pytest.approx(1.5 + half))
    assert found.passed


@pytest.mark.parametrize(
    ("moco", "isd", "balanced", "expected"),
    [
        (17.5, 16.0, 17.6, True),  # 7.5 of 10 and 6 of 8: exactly three quarters; all classes are rare here
        (17.4, 16.0, 17.6, False),
        (17.5, 15.9, 17.6, False),
        (17.5, 16.0, 17.5, False),  # the imbalance costs nothing
    ],
)
def test_the_strided_stem_is_taken_by_the_rule(
    gate: ModuleType, moco: float, isd: float, balanced: float, expected: bool
) -> None:
    def scored(value: float) -> object:
        return gate.Run({"a": value - 1, "b": value + 1}, {"a": value - 1, "b": value + 1}, {})

    start, plain_start = scored(10.0), scored(12.0)
    shares = [
        gate.kept(scored(moco), start, scored(22.0), plain_start),
        gate.kept(scored(isd), start, scored(20.0), plain_start),
    ]
    assert gate.strided_is_taken(shares, scored(balanced), scored(moco)) is expected


def test_two_negative_differences_of_runs_or_an_interval_with_zero_do_not_pass(gate: ModuleType) -> None:
    wide = [rare(gate, 9.0, -1.0), rare(gate, 9.0, -1.0)]
    assert gate.imbalance([wide, wide]).differences == (4.0,) * 4
    assert not gate.imbalance([wide, wide]).passed
    low = [rare(gate, 9.0, 9.1), rare(gate, -1.0, -1.0)]
    assert gate.imbalance([low, low]).low > 0
    assert not gate.imbalance([low, low]).passed


def test_a_question_stays_open_until_all_its_runs_are_there(gate: ModuleType) -> None:
    score = {f"n{at}": 20.0 + at % 2 for at in range(4)}
    names = [f"moco-{kind}-{key}" for keys in gate.PAIRS.values() for key in keys for kind in ("balanced", "unbalanced")]
    names += [*gate.TWINS, *(f"{name}-float32" for name in gate.TWINS)]
    runs = {name: gate.Run(score, {name: at for at, name in enumerate(score)}, {"n0": 1.0}, 1.0) for name in names}
    better = gate.Run(score, {name: at + 1.0 + at / 10 for at, name in enumerate(score)}, {"n0": 1.0}, 1.0)
    runs |= {name: better for name in names if name.startswith("moco-balanced")}
    page = gate.render(runs)
    assert "By the rule: bf16." in page
    assert "Mean over 8 classes +1.15 points" in page
    assert "4 of 4 differences of runs are positive. Decided: the gate is passed." in page
    for gone in ("moco-balanced-10", "moco-unbalanced-9-again-float32"):
        del runs[gone]
    page = gate.render(runs)
    assert "Not decided: 2 of 3 pairs are complete." in page
    assert "Not decided: 3 of 4 pairs are complete." in page
    assert "Decided" not in page


# --- the choice of settings -------------------------------------------------------------------------------------------


def test_what_is_chosen_is_that_of_the_records(tuning: ModuleType) -> None:
    folder = ROOT / "reports" / "claim-2"
    files = tuning.files(tuning.points(), tuning.scores())
    for name in ("tuning.md", "beyond.csv", "finalists.csv", "settings.csv"):
        path = folder / name
        assert (path.read_text("utf-8") if path.exists() else None) == files.get(name), "run python reports/claim-2/tuning.py"


def test_the_best_come_first_and_a_tie_goes_to_the_lower_number(tuning: ModuleType) -> None:
    assert tuning.best({1: 20.0, 2: 22.0, 3: 20.0, 4: 0.0, 5: 22.0}, 3) == [2, 5, 1]


def points_at(**values: tuple[float, float]) -> dict[int, dict[str, str]]:
    """Points 1, 2, ... with (learning rate, tau_student), named by their cell."""
    return {at: {"lr_at_tau_0.1": str(lr), "tau_student": str(tau)} for at, (lr, tau) in enumerate(values.values(), 1)}


def test_a_best_point_at_an_edge_gives_every_cell_two_trials_away_from_the_middle(tuning: ModuleType) -> None:
    points = points_at(isd=(0.0424, 0.1), moco=(0.114, 0.174))  # 0.114 is at 0.98 of its range, 0.174 at 0.899
    assert tuning.beyond(points, {"isd": 1, "moco": 2}) == {
        "isd": {  # the middle of 0.015 to 0.12 is 0.04243
            3: {"lr_at_tau_0.1": "0.02827", "tau_student": "0.1"},
            4: {"lr_at_tau_0.1": "0.0212", "tau_student": "0.1"},
        },
        "moco": {
            3: {"lr_at_tau_0.1": "0.171", "tau_student": "0.174"},
            4: {"lr_at_tau_0.1": "0.228", "tau_student": "0.174"},
        },
    }
    low = tuning.beyond(points_at(isd=(0.03, 0.053), moco=(0.119, 0.11)), {"isd": 1, "moco": 2})
    values = [[(row["lr_at_tau_0.1"], row["tau_student"]) for row in trials.values()] for trials in low.values()]
    assert values == [
        [("0.02", "0.053"), ("0.015", "0.053"), ("0.03", "0.03533"), ("0.03", "0.0265")],
        [("0.1785", "0.11"), ("0.238", "0.11"), ("0.119", "0.165"), ("0.119", "0.22")],
    ]
    middle = tuning.beyond(points_at(isd=(0.03, 0.1), moco=(0.03, 0.174)), {"isd": 1, "moco": 2})
    assert middle == {"isd": {}, "moco": {}}


def test_the_later_cells_make_the_same_trials_beyond_the_box(tuning: ModuleType) -> None:
    points = points_at(middle=(0.04, 0.1), edge=(0.115, 0.1))
    found = tuning.beyond(points, {"isd": 1, "moco": 1, "soft": 2, "hard": 1})
    assert set(map(len, found.values())) == {0}
    found = tuning.beyond(points, {"isd": 2, "moco": 1, "soft": 1, "hard": 1})
    assert [(cell, list(trials)) for cell, trials in found.items()] == [
        (cell, [3, 4]) for cell in ("isd", "moco", "soft", "hard")
    ]


def test_settings_are_chosen_step_by_step(tuning: ModuleType) -> None:
    """All trials of both cells, then those beyond the box, then the finalists on both sets."""
    points = tuning.points()
    scores = {tuning.trial(cell, at): 20.0 + (at * 5) % 12 for cell in ("isd", "moco") for at in points}  # 7, 2 and 9 are best

    def written(name: str) -> list[list[str]]:
        text = tuning.files(points, scores).get(name, "")
        return [line.split(",") for line in text.splitlines()]

    last = scores.pop("isd-12")
    assert list(tuning.files(points, scores)) == ["tuning.md"]
    assert "Nothing is chosen for isd and moco: 23 of 24 trials are finished." in tuning.files(points, scores)["tuning.md"]
    scores["isd-12"] = last
    beyond = written("beyond.csv")  # point 7 has its learning rate at the edge
    assert [row[:4] for row in beyond[1:]] == [
        ["isd", "13", "strong", "0.171"],
        ["isd", "14", "strong", "0.228"],
        ["moco", "13", "strong", "0.171"],
        ["moco", "14", "strong", "0.228"],
    ]
    assert written("finalists.csv") == []
    scores |= {"isd-13": 30.5, "isd-14": 0.0, "moco-13": 25.0}
    finalists = written("finalists.csv")
    assert [row[:2] for row in finalists[1:]] == [["isd", "7"], ["isd", "13"], ["isd", "2"]]
    scores["moco-14"] = 25.0
    assert [row[:2] for row in written("finalists.csv")[4:]] == [["moco", "7"], ["moco", "2"], ["moco", "9"]]
    scores |= {
        tuning.final(cell, at, of): 20.0 for cell, at in (("isd", 7), ("isd", 2), ("moco", 7), ("moco", 2)) for of in (9, 10)
    }
    scores |= {"isd-13-final-9": 19.0, "moco-09-final-9": 24.0, "moco-09-final-10": 17.0}
    assert [row[:2] for row in written("settings.csv")[1:]] == [["moco", "9"]]
    assert "isd has no settings yet: isd-13-final-10 not run." in tuning.files(points, scores)["tuning.md"]
    scores["isd-13-final-10"] = 21.0  # 20 on average, as trials 7 and 2
    settings = written("settings.csv")
    assert [row[:2] for row in settings[1:]] == [["isd", "2"], ["moco", "9"]]
    assert settings[0] == ["cell", "trial", *points[1]]
    assert settings[1][2:] == list(points[2].values())


# --- the confirmation -------------------------------------------------------------------------------------------------


def test_the_profile_has_the_runs_that_the_questions_need(script: ModuleType) -> None:
    chosen = {cell: {**at, "cell": cell} for cell, at in zip(("isd", "moco"), script.points(), strict=False)}
    written = script.confirm(chosen)
    runs, subsets = written["runs"], written["subsets"]
    assert set(runs) == {f"untrained-{number}" for number in range(1, 11)} | {
        f"{cell}-{kind}-{number}" for cell in ("isd", "moco") for kind in ("unbalanced", "balanced") for number in range(1, 11)
    }
    for number in range(1, 11):
        four = [runs[f"{cell}-{kind}-{number}"] for cell in ("isd", "moco") for kind in ("unbalanced", "balanced")]
        assert [one["data"]["subset"] for one in four] == [f"s{number}", f"s{number}-balanced"] * 2
        assert {(one["numerics"]["seed"], one["optim"]["epochs"]) for one in four} == {(number, 100)}
        rule = subsets[f"s{number}"]["rule"]
        assert (rule["tuning"], rule["halving"]) == (0, (number + 1) // 2)
        assert rule["part"] == ("first" if number % 2 else "second")
        assert subsets[f"s{number}-balanced"]["rule"] == {**rule, "per_class": 135}
    later = script.confirm({**chosen, "soft": chosen["isd"], "hard": chosen["moco"]})["runs"]
    assert set(later) - set(runs) == {f"{cell}-unbalanced-{number}" for cell in ("soft", "hard") for number in range(1, 11)}


def test_differences_are_taken_within_rare_classes(confirm: ModuleType) -> None:
    rare = {"isd-unbalanced": (5.0, 9.0), "moco-unbalanced": (4.0, 9.0), "isd-balanced": (8.0, 9.5), "moco-balanced": (9.0, 9.0)}
    one = {name: confirm.Run({}, {"a": a, "b": b}, {}) for name, (a, b) in rare.items()}
    found = confirm.contrasts(one)
    assert found == {"Q1": {"a": 1.0, "b": 0.0}, "Q2": {"a": 2.0, "b": -0.5}, "loss": {"a": 5.0, "b": 0.0}}


def test_effects_are_those_of_a_two_by_two_design(confirm: ModuleType) -> None:
    scores = {"isd": 27.0, "soft": 24.0, "hard": 22.0, "moco": 20.0}
    one = {f"{cell}-unbalanced": confirm.Run({}, {"a": score - 1, "b": score + 1}, {}) for cell, score in scores.items()}
    assert list(confirm.effects(one).values()) == [4.5, 2.5, 1.0]


LOSS = (1.5, 1.0, 2.0, 0.001)


@pytest.mark.parametrize(
    ("first", "second", "loss", "expected"),
    [
        ((1.0, 0.2, 1.8, 0.02), (0.9, 0.1, 1.7, 0.04), LOSS, ("supported", "supported")),
        ((1.0, 0.1, 1.9, 0.03), (0.9, 0.1, 1.7, 0.03), LOSS, ("undecided", "undecided")),  # 0.03 is above 0.05 / 2
        ((0.5, 0.2, 0.8, 0.01), (0.0, -0.4, 0.4, 0.9), LOSS, ("supported", "contradicted")),  # 0.8 is below 1, too
        ((0.0, -0.9, 0.9, 0.9), (0.1, -0.3, 0.5, 0.6), LOSS, ("contradicted", "undecided")),  # 0.5 is not below 0.5
        ((0.0, -1.0, 1.0, 0.9), (0.9, 0.2, 1.6, 0.02), (0.5, -0.1, 1.1, 0.09), ("undecided", "not testable")),
    ],
)
def test_verdicts_are_those_of_the_rules(
    confirm: ModuleType,
    first: tuple[float, ...],
    second: tuple[float, ...],
    loss: tuple[float, ...],
    expected: tuple[str, ...],
) -> None:
    means = {"Q1": confirm.Mean(*first), "Q2": confirm.Mean(*second), "loss": confirm.Mean(*loss)}
    assert tuple(confirm.verdicts(means, 6).values()) == expected
    assert set(confirm.verdicts(means, 5).values()) == {"no verdict"}


def test_the_mixed_model_of_the_first_protocols_sets_is_the_one_fitted_elsewhere(confirm: ModuleType) -> None:
    """Its estimates for ISD less MoCo v2 in `claim-r` were known, to these digits, before this code was written."""
    runs = confirm.read(ROOT / "pipelines" / "claim-r" / "params.yaml", "1-NN")
    pairs = [(runs[f"isd-r{at}"].rare, runs[f"moco-r{at}"].rare) for at in range(1, 9)]
    found = confirm.mixed_model([{cls: isd[cls] - moco[cls] for cls in isd} for isd, moco in pairs])
    assert (found.mean, found.error) == (pytest.approx(-5.51, abs=0.005), pytest.approx(0.76, abs=0.005))
    assert [round(value, 1) for value in (found.of_sets, found.of_classes, found.residual)] == [1.0, 4.3, 6.9]


def test_nothing_is_read_before_all_sets_are_there_unless_it_is_final(confirm: ModuleType) -> None:
    rare = dict(zip("abcd", (0.0, 1.0, 3.0, 5.0), strict=True))
    levels = {"isd-unbalanced": 22.0, "moco-unbalanced": 20.0, "isd-balanced": 23.5, "moco-balanced": 23.0}
    runs = {
        f"{name}-{at}": confirm.Run({}, {cls: level + value * at * len(name) ** 2 / 3000 for cls, value in rare.items()}, {})
        for name, level in levels.items()
        for at in range(1, 11)
    }
    page = confirm.render(runs, {"20-NN": runs}, final=False)
    assert "## Outcomes (10 of 10 sets)" in page
    assert "| Q1: ISD less MoCo v2, unbalanced | +1.88 |" in page  # 2 - (15^2 - 14^2) x 2.25 x 5.5 / 3000
    assert "supported |" in page
    assert "Loss and networks" not in page
    other = next(line for line in page.splitlines() if line.startswith("| 20-NN |"))  # the same scores, so the same contrasts
    values = re.findall(r"(?m)^\| (?:Q1|Q2|loss): [^|]* \| ([+-]\d\.\d\d) ", page)
    assert len(values) == 3
    assert all(f"| {value} (" in other for value in values)
    assert "+1.88 (" in other
    for gone in ("moco-balanced-3", "isd-unbalanced-7"):
        del runs[gone]
    page = confirm.render(runs, {"20-NN": runs}, final=False)
    assert page.endswith("Nothing is read: 8 of 10 sets are complete.\n")
    assert "20." not in page
    assert "## Outcomes (8 of 10 sets)" in confirm.render(runs, {"20-NN": runs}, final=True)
