"""The published numbers: the file's own rules, and every mean and difference recomputed here once more, from the plain YAML."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from isd_repro.cli import app
from isd_repro.report import paper, paper_checks
from isd_repro.report.paper import Paper
from isd_repro.report.paper_checks import check

TREE: dict[str, Any] = YAML(typ="safe").load(paper.FILE.read_text("utf-8"))
TABLES: dict[str, Any] = {table["id"]: table for table in TREE["tables"]}


def tenths(cell: Any, corrected: bool = False) -> int:
    """A printed number in tenths of a point, exactly."""
    if isinstance(cell, dict):
        cell = cell["corrected"] if corrected and "corrected" in cell else cell["printed"]
    return round(10 * float(cell))


def misfits(corrected: bool) -> dict[str, tuple[float, float]]:
    """Place -> (printed, recomputed) of what does not round to the printed decimal; integers, and no code of the package."""
    found = {}
    transfer = TABLES["transfer"]
    for name, row in transfer["rows"].items():
        *parts, mean = [tenths(cell, corrected) for cell in row["values"]]
        if 2 * abs(sum(parts) - 9 * mean) > 9:  # off by more than half a tenth
            found[f"transfer {name}"] = (mean / 10, sum(parts) / 90)
    rows = TABLES["unbalanced"]["rows"]
    for draw in range(1, 11):
        for at, group in enumerate(("all", "rare")):
            moco, isd, diff = (tenths(rows[f"{method}-d{draw}"]["values"][at], corrected) for method in ("moco", "isd", "diff"))
            if isd - moco != diff:
                found[f"D{draw} {group}"] = (diff / 10, (isd - moco) / 10)
    return found


def test_three_printed_numbers_do_not_add_up() -> None:
    assert misfits(corrected=False) == {
        "transfer simclr-r50-1000": (68.6, pytest.approx(76.644, abs=1e-3)),
        "D1 rare": (1.7, 1.8),
        "D10 rare": (1.7, -8.3),
    }
    assert misfits(corrected=True) == {"D1 rare": (1.7, 1.8)}
    found = paper_checks.checks(paper.load())
    assert len(found) == 11 + 20
    odd = {check.where: (check.outcome, float(check.printed), check.corrected) for check in found if check.outcome != "adds up"}
    assert odd == {
        "SimCLR, ResNet-50, 1,000 epochs, mean": ("does not add up", 68.6, "adds up"),
        "D1, Rare": ("within rounding", 1.7, None),
        "D10, Rare": ("does not add up", 1.7, "adds up"),
    }


@pytest.mark.parametrize(("move", "outcome"), [(0, "adds up"), (1, "within rounding"), (2, "does not add up")])
def test_outcomes_at_their_edges(move: int, outcome: str) -> None:
    """A printed difference of rounded numbers may be one tenth off, not two."""
    tree = json.loads(json.dumps(TREE))
    table = next(table for table in tree["tables"] if table["id"] == "unbalanced")
    table["rows"]["diff-d5"]["values"][0] = round(0.3 + 0.1 * move, 1)
    (found,) = [check for check in paper_checks.checks(Paper.model_validate(tree)) if check.where == "D5, All"]
    assert found.outcome == outcome


def test_gains_by_hand() -> None:
    """Means in tenths from the plain YAML; the large group from 38 equal classes: 8 large = 38 all - 30 rare."""
    rows = TABLES["unbalanced"]["rows"]
    levels = {
        (method, group): [tenths(rows[f"{method}-d{draw}"]["values"][at], corrected=True) / 10 for draw in range(1, 11)]
        for method in ("moco", "isd")
        for at, group in enumerate(("all", "rare"))
    }
    for method in ("moco", "isd"):
        both = zip(levels[method, "all"], levels[method, "rare"], strict=True)
        levels[method, "large"] = [(38 * whole - 30 * rare) / 8 for whole, rare in both]
    everything, rare, large = paper_checks.gains(paper.load().table("unbalanced"))
    for gain, group in ((everything, "all"), (rare, "rare"), (large, "large")):
        differences = [isd - moco for isd, moco in zip(levels["isd", group], levels["moco", group], strict=True)]
        assert gain.differences == pytest.approx(differences)
        assert (gain.first, gain.second) == pytest.approx((sum(levels["isd", group]) / 10, sum(levels["moco", group]) / 10))
        assert gain.paired.mean == pytest.approx(sum(differences) / 10)
    assert [round(gain.paired.mean, 2) for gain in (everything, rare, large)] == [0.91, 2.58, -5.35]
    assert [(gain.paired.above, gain.paired.below) for gain in (everything, rare, large)] == [(9, 0), (10, 0), (0, 10)]
    assert rare.paired.p == 2 / 1024


def test_rounding_error_of_the_implied_group_at_its_worst() -> None:
    """Move every printed number of one draw by half a tenth, against us."""
    large = paper_checks.gains(paper.load().table("unbalanced"))[2]

    def implied(isd: tuple[float, float], moco: tuple[float, float]) -> float:
        return (38 * (isd[0] - moco[0]) - 30 * (isd[1] - moco[1])) / 8

    exact = implied((62.3, 60.5), (62.0, 57.7))
    worst = implied((62.35, 60.45), (61.95, 57.75))
    assert large.differences[4] == pytest.approx(exact)
    assert large.hidden == pytest.approx(worst - exact)


def test_the_figure_ends_at_the_table() -> None:
    """Students at epoch 200 are Table 1's 1-NN: that is how the figure was calibrated."""
    curve, table = paper.load().table("teacher_student"), paper.load().table("imagenet_main")
    for name in ("moco-r18", "byol-asym-r18", "isd-r18"):
        assert curve.value(f"{name}-student", "e200") == table.value(name, "nn")


def test_tolerances_are_below_what_they_must_tell_apart() -> None:
    """On ResNet-18 a method inside its tolerance is outside that of the next one, where ISD and BYOL-asym are concerned."""
    table = paper.load().table("imagenet_main")
    for key, column in table.columns.items():
        isd, byol = table.value("isd-r18", key), table.value("byol-asym-r18", key)
        assert isd is not None
        assert byol is not None
        assert column.tolerance is not None
        assert 2 * column.tolerance.points <= isd.value - byol.value


def test_every_correction_and_every_verdict_has_its_reason_and_every_name_exists() -> None:
    published = paper.load()
    ids = [table.id for table in published.tables]
    assert len(set(ids)) == len(ids)
    for table in published.tables:
        assert table.images in published.images
        assert {len(row.values) for row in table.rows.values()} == {len(table.columns)}
        assert {table.source, *(value.source for _, _, value in table.cells() if value.source)} <= set(published.sources)
        for column in table.columns.values():
            assert (column.tolerance is None) == bool(column.not_comparable)
            assert column.tolerance is None or len(column.tolerance.why) > 20
        for _, _, value in table.cells():
            assert (value.corrected is None) == (not value.why)
            assert value.corrected != value.printed
    for item in published.disagreements:
        assert set(item.says) <= set(published.sources)
        assert set(item.tables) <= set(ids)


def test_the_command_prints_the_three_and_marks_what_was_read(capsys: pytest.CaptureFixture[str]) -> None:
    check()
    computed, read = capsys.readouterr().out.split("Read, not computed")
    for words in ("mean of 9 = 76.64, printed 68.6", "ISD 46.5 − MoCo 44.7 = 1.80, printed 1.7", "59.8 = −8.30, printed 1.7"):
        assert words in computed
    assert computed.count("\n- ") == 3 + 3
    assert "54.5" in read
    assert "54.5" not in computed


def test_the_command_as_json() -> None:
    done = CliRunner().invoke(app, ["paper", "check", "--json"])
    assert done.exit_code == 0
    tree = json.loads(done.stdout)
    assert len(tree["computed"]["checks"]) == 31
    assert [gain["paired"]["mean"] for gain in tree["computed"]["gains"]["unbalanced"]] == [0.91, 2.58, -5.3525]
    assert {item["id"] for item in tree["read"]} >= {"symmetric-marks", "moco-r18-linear", "figure-1-ranks"}
