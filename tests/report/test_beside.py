"""The paper's columns: never in ours, a verdict only where it means something, repetitions as one row."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from isd_repro.config import reader as config
from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.records import EvaluationRecord, pack_labels, score_groups, write_record
from isd_repro.report import beside, page, pool, records
from isd_repro.report.cells import Cell, Table
from isd_repro.report.paper import PaperColumn, Tolerance, load
from isd_repro.runtime.errors import ConfigError
from tests.report import synthetic
from tests.report.conftest import Profile

ROOT = Path(__file__).parents[2]
IMAGENET = "ImageNet-1k (ILSVRC 2012)"
TABLE_1 = {"moco-r18": "moco-r18", "isd-r18": "isd-r18"}


def like_the_paper(params: Params, rows: dict[str, str], table: str, **change: Any) -> Params:
    """The same profile on ImageNet with ResNet-18 and 200 epochs, beside a table of the paper."""
    tree = params.model_dump(mode="json")
    tree["report"]["paper"] = [{"table": table, "rows": rows}]
    for subset in tree["subsets"].values():
        subset["source"] = {"name": "image-folder", "dataset": IMAGENET, "root_env": "SOMEWHERE"}
    for run in tree["runs"].values():
        run["backbone"] = {"arch": "resnet18", "channels": 1}
        run["optim"]["epochs"] = 200
        for group, values in change.items():
            run[group] |= values
    return Params.model_validate(tree)


def table_1(tmp_path: Path, rows: dict[str, str] | None = None, **change: Any) -> tuple[Params, Layout]:
    runs = {"moco-r18": ("MoCo v2", "whole"), "isd-r18": ("ISD", "whole")}
    params = synthetic.profile(runs, {"whole": {"name": "all"}}, {"moco-r18": "moco"})
    params = like_the_paper(params, TABLE_1 if rows is None else rows, "imagenet_main", **change)
    return params, synthetic.layout(tmp_path, params)


def write_score(layout: Layout, params: Params, run: str, right: int, metric: str = "1-NN", *, stored: bool = True) -> None:
    """A record in which `right` of 1,000 queries are answered rightly."""
    label = torch.arange(1000) % 10
    predicted = torch.where(torch.arange(1000) < right, label, (label + 1) % 10)
    identity = synthetic.manifest(params, params.runs[run].data.subset, 1000)
    linear = metric.startswith("linear")
    record = EvaluationRecord(
        kind="linear" if linear else "knn",
        profile=params.profile,
        run=run,
        protocol="paper" if linear else "1-NN, 20-NN exact float32, ties by lowest label",
        settings={"k": [1, 20]},
        manifest=identity,
        encoder_sha256=synthetic.sha(run),
        features_sha256=None,
        scores=tuple(score_groups("student", metric, predicted, label, synthetic.masks(label, identity.large))),
        labels=pack_labels(label),
        predictions={f"student/{metric}": pack_labels(predicted)} if stored else {},
        provenance=synthetic.provenance(),
    )
    write_record(layout.record(run, record.kind), record)


def cells_of(profile: Profile, table: str = "paper-imagenet_main") -> dict[tuple[str, str, str], Cell]:
    (found,) = [one for one in profile.report().tables if one.id == table]
    return {
        (row.label, column.span.partition(" (n = ")[0], column.head): cell
        for row in (*found.rows, *found.foot)
        for column, cell in zip(found.columns, row.cells, strict=True)
    }


# --- where the paper may stand ------------------------------------------------------------------------------------------


def test_only_the_papers_profiles_have_its_columns() -> None:
    """Every profile of the repository: those on ImageNet have a table of the paper, and no other has a word of one."""
    for path in [ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))]:
        params, layout = config.load(path)
        report = page.assemble(params, records.load(params, layout), layout)
        kinds = {cell.kind for table in report.tables for row in (*table.rows, *table.foot) for cell in row.cells}
        if path.parent.name in ("imagenet", "imagenet-unbalanced"):
            assert {"paper", "against"} <= kinds
        else:
            assert not kinds & {"paper", "against", "computed"}, path
            assert not params.report.paper
            assert (
                "Beside the paper",
                "No number here stands beside one of the paper: this profile does not run its protocol.",
            ) in (report.overview)


def test_a_table_of_imagenet_stands_beside_no_other_images(profile: Profile) -> None:
    tree = profile.params.model_dump(mode="json")
    tree["report"]["paper"] = [{"table": "imagenet_main", "rows": {"isd": "isd-r18"}}]
    with pytest.raises(ConfigError, match=r"report\.paper\.rows\.isd: trained on MNIST digits"):
        Profile(Params.model_validate(tree), profile.layout).report()


@pytest.mark.parametrize(
    ("table", "rows", "says"),
    [
        ("table_1", TABLE_1, "no table 'table_1'"),
        ("imagenet_main", {"isd-r18": "isd-r81"}, "no row 'isd-r81'"),
    ],
)
def test_a_place_that_the_paper_lacks_is_named(tmp_path: Path, table: str, rows: dict[str, str], says: str) -> None:
    params, layout = table_1(tmp_path)
    tree = params.model_dump(mode="json")
    tree["report"]["paper"] = [{"table": table, "rows": rows}]
    with pytest.raises(ConfigError, match=says):
        Profile(Params.model_validate(tree), layout).report()


def test_a_run_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="'isd-r19' in a list of runs or in report is none of the runs"):
        table_1(Path(), {"isd-r19": "isd-r18"})


# --- ours and theirs ----------------------------------------------------------------------------------------------------


def test_without_a_run_ours_says_so_and_never_shows_the_papers_number(tmp_path: Path) -> None:
    cells = cells_of(Profile(*table_1(tmp_path)))
    assert len(cells) == 2 * 9
    for (_, _, head), cell in cells.items():
        if head == "ours":
            assert (cell.number, cell.value, cell.paper) == ("not run", None, None)
        if head == "diff":
            assert (cell.plain, cell.value, cell.verdict) == ("", None, "")
    assert [cells["ISD", span, "paper"].number for span in ("Linear", "1-NN", "20-NN")] == ["53.8", "41.5", "46.6"]


@pytest.mark.parametrize(
    ("right", "shown"),
    [(415, "0.0 (within)"), (408, "−0.7 (within)"), (407, "−0.8 (outside)"), (422, "+0.7 (within)"), (423, "+0.8 (outside)")],
)
def test_verdict_by_the_tolerance_of_the_file(tmp_path: Path, right: int, shown: str) -> None:
    """ISD's 1-NN on ResNet-18 is printed 41.5, tolerance 0.7: 40.8 and 42.2 are the last values within."""
    params, layout = table_1(tmp_path)
    write_score(layout, params, "isd-r18", right)
    cells = cells_of(Profile(params, layout))
    assert cells["ISD", "1-NN", "ours"].value == right / 10
    assert cells["ISD", "1-NN", "diff"].plain == shown
    assert cells["MoCo v2", "1-NN", "diff"].plain == ""
    assert cells["ISD", "Linear", "ours"].number == "not run"


def test_the_number_of_queries_stands_above_our_numbers(tmp_path: Path) -> None:
    params, layout = table_1(tmp_path)
    write_score(layout, params, "isd-r18", 415)
    (table,) = [table for table in Profile(params, layout).report().tables if table.id == "paper-imagenet_main"]
    assert [span for span, _ in table.spans] == ["Linear", "1-NN (n = 1,000)", "20-NN"]
    (draws,) = [table for table in Profile(*ten_draws(tmp_path / "draws", 10)).report().tables if table.id == "paper-unbalanced"]
    assert [span for span, _ in draws.spans] == ["All (n = 1,000)", "Rare (n = 800)", "Large, implied (n = 200)"]


def test_linear_of_the_paper_is_the_best_epoch(tmp_path: Path) -> None:
    params, layout = table_1(tmp_path)
    write_score(layout, params, "isd-r18", 538, "linear-last")
    assert cells_of(Profile(params, layout))["ISD", "Linear", "ours"].number == "not run"
    write_score(layout, params, "isd-r18", 538, "linear-best")
    assert cells_of(Profile(params, layout))["ISD", "Linear", "diff"].plain == "0.0 (within)"


def test_a_verdict_is_withheld_where_the_protocol_is_another(tmp_path: Path) -> None:
    params, layout = table_1(tmp_path, optim={"epochs": 100})
    write_score(layout, params, "isd-r18", 415)
    cell = cells_of(Profile(params, layout))["ISD", "1-NN", "diff"]
    assert (cell.verdict, cell.value, cell.detail) == ("not comparable", None, "epochs: 100 here, 200 in the paper")


def test_a_verdict_is_withheld_where_the_record_was_made_otherwise(tmp_path: Path) -> None:
    params, layout = table_1(tmp_path)
    other = like_the_paper(params, TABLE_1, "imagenet_main", optim={"lr": 0.06})
    synthetic.write_run(layout, other, "isd-r18", 0.4, parts=("pretrain", "knn"))
    cell = cells_of(Profile(params, layout))["ISD", "1-NN", "diff"]
    assert (cell.verdict, cell.value) == ("not comparable", None)
    assert "optim.lr was 0.06, is 0.05" in cell.detail


def test_a_number_that_nothing_checks_is_not_judged(tmp_path: Path) -> None:
    params, layout = table_1(tmp_path)
    write_score(layout, params, "isd-r18", 415, stored=False)
    cells = cells_of(Profile(params, layout))
    assert cells["ISD", "1-NN", "ours"].number == "41.5†"
    assert (cells["ISD", "1-NN", "diff"].verdict, cells["ISD", "1-NN", "diff"].detail) == (
        "not comparable",
        "nothing checks our number",
    )


def test_a_column_without_tolerance_has_no_verdict() -> None:
    theirs = Cell("paper", value=50.0)
    reason = PaperColumn(head="x", metric="1-NN", not_comparable="other images")
    found = beside.against(Cell("score", ("a",), value=50.0), theirs, reason, "")
    assert (found.verdict, found.value, found.detail) == ("not comparable", None, "other images")
    judged = PaperColumn(head="x", metric="1-NN", tolerance=Tolerance(points="0.5", why="y"))  # type: ignore[arg-type]
    assert beside.against(Cell("score", ("a",), value=50.5), theirs, judged, "").verdict == "within"
    assert beside.against(Cell("score", ("a",), value=50.6), theirs, judged, "").verdict == "outside"


def test_marks_of_misprints_and_borrowed_numbers() -> None:
    paper = load()
    table = paper.table("unbalanced")
    assert beside.paper_cell(paper, table, "moco-d10", "rare").number == "49.8*"
    assert beside.paper_cell(paper, table, "isd-d10", "rare").number == "51.5"
    assert beside.paper_cell(paper, paper.table("imagenet_main"), "moco-r50", "nn").number == "50.9‡"
    empty = beside.paper_cell(paper, paper.table("imagenet_main"), "co2-r50", "nn")
    assert (empty.number, empty.known) == ("\N{EN DASH}", False)


# --- repetitions --------------------------------------------------------------------------------------------------------


def seeded(tmp_path: Path, right: dict[int, int]) -> tuple[Params, Layout]:
    """ISD under several seeds on one subset, MoCo under one; the number right of 1,000 by seed."""
    runs = {"moco": ("MoCo", "whole"), **{f"isd-s{seed}": (f"ISD, seed {seed}", "whole") for seed in right}}
    params = synthetic.profile(runs, {"whole": {"name": "all"}}, {"moco": "moco"})
    params = like_the_paper(params, {f"isd-s{seed}": "isd-r18" for seed in right}, "imagenet_main")
    tree = params.model_dump(mode="json")
    for seed in right:
        tree["runs"][f"isd-s{seed}"]["numerics"]["seed"] = seed
    params = Params.model_validate(tree)
    layout = synthetic.layout(tmp_path, params)
    write_score(layout, params, "moco", 390)
    for seed, correct in right.items():
        write_score(layout, params, f"isd-s{seed}", correct)
    return params, layout


def test_seeds_pool_into_one_row_by_hand(tmp_path: Path) -> None:
    """40, 41 and 45 percent: mean 42, deviation sqrt((4 + 1 + 9) / 2)."""
    params, layout = seeded(tmp_path, {0: 400, 1: 410, 2: 450})
    report = Profile(params, layout).report()
    table = next(table for table in report.tables if table.id == "whole")
    assert [row.label for row in table.rows] == ["MoCo", "ISD, seed 0", "ISD, seed 1", "ISD, seed 2"]
    (foot,) = table.foot
    mean = foot.cells[0]
    assert (foot.label, mean.value, mean.count, mean.deviation) == ("ISD, 3 seeds", pytest.approx(42), 3, pytest.approx(7**0.5))
    assert mean.runs == ("isd-s0", "isd-s1", "isd-s2")
    assert mean.plain == "42.0 (s.d. 2.6, n = 3)"
    ours = cells_of(Profile(params, layout))["ISD, 3 seeds", "1-NN", "ours"]
    assert ours == replace(mean, best=False)
    assert cells_of(Profile(params, layout))["ISD, 3 seeds", "1-NN", "diff"].plain == "+0.5 (within)"
    said = [finding.plain for block in report.blocks for finding in block.findings]
    assert any("+3.0 points on all queries (means of 3 and 1 seeds, s.d. 2.6 and unknown)" in words for words in said)


def test_a_missing_seed_is_counted(tmp_path: Path) -> None:
    params, layout = seeded(tmp_path, {0: 400, 1: 410, 2: 450})
    layout.record("isd-s2", "knn").unlink()
    table = next(table for table in Profile(params, layout).report().tables if table.id == "whole")
    mean = table.foot[0].cells[0]
    assert (mean.value, mean.count) == (pytest.approx(40.5), 2)
    assert "1 more not run" in mean.detail


def test_runs_that_differ_in_more_than_the_seed_are_not_repetitions(tmp_path: Path) -> None:
    params, _ = seeded(tmp_path, {0: 400, 1: 410})
    assert pool.repetitions(params, list(params.runs)) == [["moco"], ["isd-s0", "isd-s1"]]
    tree = params.model_dump(mode="json")
    tree["runs"]["isd-s1"]["optim"]["lr"] = 0.06
    assert pool.repetitions(Params.model_validate(tree), ["isd-s0", "isd-s1"]) == [["isd-s0"], ["isd-s1"]]


# --- the table of draws -------------------------------------------------------------------------------------------------


def ten_draws(tmp_path: Path, gain: int, draws: int = 10) -> tuple[Params, Layout]:
    """MoCo answers 500 of 1,000 rightly on each draw, ISD `gain` more."""
    runs = {
        f"{name}-d{i}": (f"{label}, D{i}", f"d{i}") for i in range(1, 11) for name, label in (("moco", "MoCo"), ("isd", "ISD"))
    }
    rules = {f"d{i}": {"name": "list", "list": f"D{i}"} for i in range(1, 11)}
    params = synthetic.profile(runs, rules, {run: run.split("-")[0] for run in runs})
    params = like_the_paper(params, {run: run for run in runs}, "unbalanced")
    layout = synthetic.layout(tmp_path, params)
    for i in range(1, draws + 1):
        write_score(layout, params, f"moco-d{i}", 500)
        write_score(layout, params, f"isd-d{i}", 500 + gain)
    return params, layout


def test_mean_gain_beside_the_papers(tmp_path: Path) -> None:
    """Of ten more right in 1,000, two are large: +1.0 of all, of 800 rare and of 200 large. The paper: +0.91, +2.58, -5.35."""
    cells = cells_of(Profile(*ten_draws(tmp_path, 10)), "paper-unbalanced")
    assert [cells["D3", group, "paper"].number for group in ("All", "Rare", "Large, implied")] == ["+2.5", "+3.5", "−1.2"]
    assert cells["D3", "All", "ours"].value == pytest.approx(1.0)
    assert (cells["D3", "All", "diff"].value, cells["D3", "All", "diff"].verdict) == (pytest.approx(-1.5), "")
    means = [cells["Mean", group, "ours"].value for group in ("All", "Rare", "Large, implied")]
    assert means == pytest.approx([1.0, 1.0, 1.0])
    assert [cells["Mean", group, "paper"].number for group in ("All", "Rare", "Large, implied")] == ["+0.91", "+2.58", "−5.35"]
    shown = [cells["Mean", group, "diff"].plain for group in ("All", "Rare", "Large, implied")]
    assert shown == ["+0.1 (within)", "−1.6 (outside)", "+6.4 (outside)"]
    levels = cells_of(Profile(*ten_draws(tmp_path, 10)), "paper-unbalanced-levels")
    assert {cell.verdict for cell in levels.values()} == {""}
    assert levels["D10", "Rare", "MoCo, paper"].number == "49.8*"


def test_no_verdict_before_every_draw_has_been_run(tmp_path: Path) -> None:
    cells = cells_of(Profile(*ten_draws(tmp_path, 10, draws=9)), "paper-unbalanced")
    for group in ("All", "Rare", "Large, implied"):
        assert cells["D10", group, "ours"].number == "not run"
        assert cells["Mean", group, "diff"].plain == "not comparable"
        assert cells["Mean", group, "diff"].detail == "9 of 10 draws have been run"


def test_another_draw_is_not_the_papers(tmp_path: Path) -> None:
    params, layout = ten_draws(tmp_path, 10)
    tree = params.model_dump(mode="json")
    tree["subsets"]["d4"]["rule"] = {"name": "unbalanced", "classes": 10, "large": 2, "rare_images": 5}
    params = Params.model_validate(tree)
    for run in ("moco-d4", "isd-d4"):
        write_score(layout, params, run, 510)
    cell = cells_of(Profile(params, layout), "paper-unbalanced")["Mean", "All", "diff"]
    assert (cell.verdict, cell.detail) == ("not comparable", "list: another draw here, D4 in the paper")


# --- the files ----------------------------------------------------------------------------------------------------------


def test_every_published_number_is_in_the_dumps(tmp_path: Path) -> None:
    params, layout = table_1(tmp_path)
    write_score(layout, params, "isd-r18", 415)
    files = {name: content.decode() for name, content in page.render(Profile(params, layout).report()).items()}
    cells = json.loads(files["cells.json"])["cells"]
    shown = {
        (cell["paper"]["row"], cell["paper"]["column"]): cell["paper"]["printed"] for cell in cells if cell["kind"] == "paper"
    }
    table = load().table("imagenet_main")
    assert shown == {(row, column): float(value.printed) for row, column, value in table.cells()}
    rows = list(csv.DictReader(StringIO(files["cells.csv"])))
    (judged,) = [row for row in rows if row["kind"] == "against" and row["verdict"]]
    assert (judged["value"], judged["verdict"], judged["tolerance"], judged["paper_printed"]) == ("0.0", "within", "0.7", "41.5")
    for name in ("table.md", "index.html", "table.tex"):
        assert "within" in files[name]
        assert "not run" in files[name]


def test_a_second_render_with_paper_columns_is_byte_equal(tmp_path: Path) -> None:
    made = [page.render(Profile(*ten_draws(tmp_path, 7)).report()) for _ in range(2)]
    assert made[0] == made[1]


def test_the_overview_counts_verdicts(tmp_path: Path) -> None:
    """Six numbers of two rows: 41.5 within by 0.3, 37.7 off by 1.0 (outside 0.7, within twice that), four not run."""
    params, layout = table_1(tmp_path)
    write_score(layout, params, "isd-r18", 418)
    write_score(layout, params, "moco-r18", 387)
    facts = dict(Profile(params, layout).report().overview)
    assert facts["Beside the paper"] == (
        "Of 6 published numbers with a tolerance fixed beforehand, ours are: 1 within, 1 outside, 0 not comparable and 4 not run."
        " At half the tolerance 1 would be within, at twice 2."
    )
    assert facts["Main result"].startswith("ISD against MoCo v2 (1-NN, student): +3.1 points on all queries")


def test_the_overview_without_runs(tmp_path: Path) -> None:
    facts = dict(Profile(*table_1(tmp_path)).report().overview)
    assert facts["What was run"] == "Nothing yet: none of 2 runs has a record."
    outside = "outside this profile: linear evaluation, few labels, transfer and snapshots"
    assert facts["Not done"] == f"Not run: all 2 runs; {outside}; no run is repeated with another seed."
    assert "Main result" not in facts


def test_the_overview_of_one_draw_and_one_seed(profile: Profile) -> None:
    facts = dict(profile.report().overview)
    cells = [cell for table in profile.report().tables for row in table.rows for cell in row.cells if cell.kind == "score"]
    halves = [(cell.high - cell.low) / 2 for cell in cells if cell.high is not None and cell.low is not None]
    assert facts["What was run"].startswith("4 of 5 runs have scores, 4 of them trained; all 36 scores were recomputed")
    assert facts["How certain"].startswith(
        f"95 % intervals over queries of ± {min(halves):.1f} to {max(halves):.1f} points; one run"
    )
    assert "nothing is known of the spread over seeds and draws" in facts["How certain"]
    outside = "outside this profile: linear evaluation, few labels, transfer and snapshots"
    assert facts["Not done"] == f"Not run: byol; {outside}; no run is repeated with another seed."


def test_terminal_and_files_leave_out_rows_with_nothing_to_show() -> None:
    """Differences of the transfer table, before any run: in the dumps, in no table for readers."""
    params, layout = config.load(ROOT / "pipelines" / "imagenet" / "params.yaml")
    report = page.assemble(params, records.load(params, layout), layout)
    (table,) = [table for table in report.tables if table.id == "paper-transfer"]
    assert len(table.rows) == 3 * 7
    assert [row.label.rpartition(": ")[2] for row in table.shown] == ["ours", "paper"] * 7
    assert widths(table) == {10}
    assert not re.search(r"ResNet-\d\d: diff", page.render(report)["table.md"].decode())


def widths(table: Table) -> set[int]:
    return {len(row.cells) for row in (*table.rows, *table.foot)}
