"""The paper's numbers beside ours: never in ours, and a verdict only where it means something."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from isd_repro.config import reader as config
from isd_repro.config.params import Params
from isd_repro.report import page, paper_comparison, run_records
from isd_repro.report.cells import Cell
from isd_repro.report.paper import load
from isd_repro.runtime.errors import ConfigError
from tests.report import synthetic
from tests.report.conftest import Profile

ROOT = Path(__file__).parents[2]
IMAGENET = "ImageNet-1k (ILSVRC 2012)"
TABLE_1 = {"moco-r18": "moco-r18", "isd-r18": "isd-r18"}


@pytest.fixture(autouse=True)
def _the_papers_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiles here are small; `tests/cheats/test_paper.py` is about their images."""
    monkeypatch.setattr(paper_comparison, "other_images", lambda *_: "")


def like_the_paper(params: Params, rows: dict[str, str], table: str, **change: Any) -> Params:
    """The same profile on ImageNet with ResNet-18 and 200 epochs, beside a table of the paper."""
    tree = params.model_dump(mode="json")
    tree["report"]["paper"] = [{"table": table, "rows": rows}]
    for subset in tree["subsets"].values():
        subset["source"] = {"name": "image-folder", "dataset": IMAGENET, "root_env": "SOMEWHERE"}
    for run in tree["runs"].values():
        run["backbone"] = {"arch": "resnet18", "channels": 1}
        run["optim"] |= {"epochs": 200, "batch_size": 256}
        for group, values in change.items():
            run[group] |= values
    return Params.model_validate(tree)


def table_1(tmp_path: Path, **change: Any) -> Profile:
    runs = {"moco-r18": ("MoCo v2", "whole"), "isd-r18": ("ISD", "whole")}
    params = synthetic.profile(runs, {"whole": {"name": "all"}}, {"moco-r18": "moco"})
    params = like_the_paper(params, TABLE_1, "imagenet_main", **change)
    return Profile(params, synthetic.layout(tmp_path, params))


def write_score(profile: Profile, run: str, right: int, metric: str = "1-NN", *, stored: bool = True) -> Profile:
    """So many of 1,000 queries are answered rightly."""
    synthetic.write_counts(profile.layout, profile.params, run, {"all": right}, queries=1000, metric=metric, stored=stored)
    return profile


def cells_of(profile: Profile, table: str = "paper-imagenet_main") -> dict[tuple[str, str, str], Cell]:
    """By row, column and what is shown: ours, paper or diff."""
    (found,) = [one for one in profile.report().tables if one.id == table]
    cells = {}
    for row in (*found.rows, *found.foot):
        for column, cell in zip(found.columns, row.cells, strict=True):
            label, _, word = row.label.partition(": ")
            head, shown = (column.head, word) if word else (column.span, column.head)
            cells[label, head.partition(" (n = ")[0], shown] = cell
    return cells


# --- where the paper may stand ----------------------------------------------------------------------------------------


def test_only_the_papers_profiles_have_its_columns() -> None:
    """Every profile of the repository: those on ImageNet have a table of the paper, and no other has a word of one."""
    for path in [ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))]:
        params, layout = config.load(path)
        report = page.assemble(params, run_records.load(params, layout), layout)
        kinds = {cell.kind for table in report.tables for row in (*table.rows, *table.foot) for cell in row.cells}
        if path.parent.name in ("imagenet", "imagenet-unbalanced"):
            assert {"paper", "against"} <= kinds
        else:
            assert not kinds & {"paper", "against", "computed"}, path


@pytest.mark.parametrize(
    ("table", "rows", "says"),
    [
        ("table_1", TABLE_1, "no table 'table_1'"),
        ("imagenet_main", {"isd-r18": "isd-r81"}, "no row 'isd-r81'"),
    ],
)
def test_a_place_that_the_paper_lacks_is_named(tmp_path: Path, table: str, rows: dict[str, str], says: str) -> None:
    profile = table_1(tmp_path)
    wanted = [{"table": table, "rows": rows}]
    tree = profile.params.model_dump(mode="json")
    tree["report"]["paper"] = wanted
    with pytest.raises(ConfigError, match=says):
        Profile(Params.model_validate(tree), profile.layout).report()


def test_a_table_of_imagenet_stands_beside_no_other_images(profile: Profile) -> None:
    tree = profile.params.model_dump(mode="json")
    tree["report"]["paper"] = [{"table": "imagenet_main", "rows": {"isd": "isd-r18"}}]
    with pytest.raises(ConfigError, match=r"report\.paper\.rows\.isd: trained on MNIST digits"):
        Profile(Params.model_validate(tree), profile.layout).report()


# --- ours and theirs --------------------------------------------------------------------------------------------------


def test_without_a_run_ours_says_so_and_never_shows_the_papers_number(tmp_path: Path) -> None:
    profile = table_1(tmp_path)
    cells = cells_of(profile)
    assert len(cells) == 2 * 9
    for (_, _, word), cell in cells.items():
        if word == "ours":
            assert (cell.number, cell.value, cell.paper) == ("not run", None, None)
        if word == "diff":
            assert (cell.plain, cell.value, cell.verdict) == ("", None, "")
    assert [cells["ISD", head, "paper"].number for head in ("linear", "1-NN", "20-NN")] == ["53.8", "41.5", "46.6"]
    facts = dict(profile.report().overview)
    assert facts["What was run"] == "Nothing yet: none of the 2 runs has a record."
    assert profile.report().result == ""
    (table, *_) = profile.report().tables
    assert [row.label for row in table.shown] == ["MoCo v2: ours", "MoCo v2: paper", "ISD: ours", "ISD: paper"]


@pytest.mark.parametrize(
    ("right", "shown"),
    [(415, "0.0 (within)"), (408, "−0.7 (within)"), (407, "−0.8 (outside)"), (422, "+0.7 (within)"), (423, "+0.8 (outside)")],
)
def test_verdict_by_the_tolerance_of_the_file(tmp_path: Path, right: int, shown: str) -> None:
    """ISD's 1-NN on ResNet-18 is printed 41.5, tolerance 0.7: 40.8 and 42.2 are the last values within."""
    profile = write_score(table_1(tmp_path), "isd-r18", right)
    cells = cells_of(profile)
    assert cells["ISD", "1-NN", "ours"].value == right / 10
    assert cells["ISD", "1-NN", "diff"].plain == shown
    assert cells["MoCo v2", "1-NN", "diff"].plain == ""
    assert cells["ISD", "linear", "ours"].number == "not run"
    heads = [column.head for column in profile.report().tables[0].columns]
    assert heads == ["linear", "1-NN (n = 1,000)", "20-NN"]


def test_linear_of_the_paper_is_the_best_epoch(tmp_path: Path) -> None:
    profile = write_score(table_1(tmp_path), "isd-r18", 538, "linear-last")
    assert cells_of(profile)["ISD", "linear", "ours"].number == "not run"
    assert cells_of(write_score(profile, "isd-r18", 538, "linear-best"))["ISD", "linear", "diff"].plain == "0.0 (within)"


def test_a_verdict_is_withheld_where_the_protocol_is_another(tmp_path: Path) -> None:
    cell = cells_of(write_score(table_1(tmp_path, optim={"epochs": 100}), "isd-r18", 415))["ISD", "1-NN", "diff"]
    assert (cell.verdict, cell.value, cell.detail) == ("not comparable", None, "epochs: 100 here, 200 in the paper")


def test_a_verdict_is_withheld_where_the_record_was_made_otherwise(tmp_path: Path) -> None:
    profile = table_1(tmp_path)
    other = like_the_paper(profile.params, TABLE_1, "imagenet_main", optim={"lr": 0.06})
    synthetic.write_run(profile.layout, other, "isd-r18", 0.4, parts=("pretrain", "knn"))
    cell = cells_of(profile)["ISD", "1-NN", "diff"]
    assert (cell.verdict, cell.value) == ("not comparable", None)
    assert "optim.lr was 0.06, is 0.05" in cell.detail


def test_a_number_that_nothing_checks_is_not_judged(tmp_path: Path) -> None:
    cells = cells_of(write_score(table_1(tmp_path), "isd-r18", 415, stored=False))
    assert cells["ISD", "1-NN", "ours"].number == "41.5†"
    cell = cells["ISD", "1-NN", "diff"]
    assert (cell.verdict, cell.detail) == ("not comparable", "our number cannot be recomputed")


def test_marks_of_misprints_and_borrowed_numbers() -> None:
    paper = load()
    unbalanced, main = paper.table("unbalanced"), paper.table("imagenet_main")
    assert paper_comparison.paper_cell(paper, unbalanced, "moco-d10", "rare").number == "49.8*"
    assert paper_comparison.paper_cell(paper, unbalanced, "isd-d10", "rare").number == "51.5"
    assert paper_comparison.paper_cell(paper, main, "moco-r50", "nn").number == "50.9‡"
    empty = paper_comparison.paper_cell(paper, main, "co2-r50", "nn")
    assert (empty.number, empty.known) == ("\N{EN DASH}", False)


# --- the table of draws -----------------------------------------------------------------------------------------------


def ten_draws(tmp_path: Path, gain: int, draws: int = 10) -> Profile:
    """MoCo answers 500 of 1,000 rightly on each draw, ISD `gain` more."""
    runs = {
        f"{name}-d{i}": (f"{label}, D{i}", f"d{i}") for i in range(1, 11) for name, label in (("moco", "MoCo"), ("isd", "ISD"))
    }
    rules = {f"d{i}": {"name": "list", "list": f"D{i}"} for i in range(1, 11)}
    params = synthetic.profile(runs, rules, {run: run.split("-")[0] for run in runs})
    params = like_the_paper(params, {run: run for run in runs}, "unbalanced")
    profile = Profile(params, synthetic.layout(tmp_path, params))
    for i in range(1, draws + 1):
        write_score(profile, f"moco-d{i}", 500)
        write_score(profile, f"isd-d{i}", 500 + gain)
    return profile


GROUPS = ("All", "Rare", "Large, implied")


def test_mean_gain_beside_the_papers(tmp_path: Path) -> None:
    """Of ten more right in 1,000, two are large: +1.0 of all, of 800 rare and of 200 large. The paper: +0.91, +2.58, -5.35."""
    profile = ten_draws(tmp_path, 10)
    cells = cells_of(profile, "paper-unbalanced")
    assert [cells["D3", group, "paper"].number for group in GROUPS] == ["+2.5", "+3.5", "−1.2"]
    assert cells["D3", "All", "ours"].value == pytest.approx(1.0)
    assert (cells["D3", "All", "diff"].value, cells["D3", "All", "diff"].verdict) == (pytest.approx(-1.5), "")
    assert [cells["Mean", group, "ours"].value for group in GROUPS] == pytest.approx([1.0, 1.0, 1.0])
    assert [cells["Mean", group, "paper"].number for group in GROUPS] == ["+0.91", "+2.58", "−5.35"]
    assert [cells["Mean", group, "diff"].plain for group in GROUPS] == ["+0.1 (within)", "−1.6 (outside)", "+6.4 (outside)"]
    levels = cells_of(profile, "paper-unbalanced-levels")
    assert {cell.verdict for cell in levels.values()} == {""}
    assert levels["D10", "Rare", "MoCo, paper"].number == "49.8*"
    assert page.render(profile.report()) == page.render(profile.report())


def test_no_verdict_before_every_draw_has_been_run(tmp_path: Path) -> None:
    cells = cells_of(ten_draws(tmp_path, 10, draws=9), "paper-unbalanced")
    for group in GROUPS:
        assert cells["D10", group, "ours"].number == "not run"
        assert cells["Mean", group, "diff"].plain == "not comparable"
        assert cells["Mean", group, "diff"].detail == "9 of 10 draws have been run"


def test_another_draw_is_not_the_papers(tmp_path: Path) -> None:
    profile = ten_draws(tmp_path, 10)
    tree = profile.params.model_dump(mode="json")
    tree["subsets"]["d4"]["rule"] = {"name": "unbalanced", "classes": 10, "large": 2, "rare_images": 5}
    changed = Profile(Params.model_validate(tree), profile.layout)
    for run in ("moco-d4", "isd-d4"):
        write_score(changed, run, 510)
    cell = cells_of(changed, "paper-unbalanced")["Mean", "All", "diff"]
    assert (cell.verdict, cell.detail) == ("not comparable", "list: another draw here, D4 in the paper")


# --- the files --------------------------------------------------------------------------------------------------------


def test_every_published_number_is_in_the_files(tmp_path: Path) -> None:
    """41.5 within by 0.3, 37.7 off by 1.0 (outside 0.7, within twice that), four of six not run."""
    profile = write_score(write_score(table_1(tmp_path), "isd-r18", 418), "moco-r18", 387)
    files = profile.files()
    cells = json.loads(files["cells.json"])["cells"]
    shown = {
        (cell["paper"]["row"], cell["paper"]["column"]): cell["paper"]["printed"] for cell in cells if cell["kind"] == "paper"
    }
    assert shown == {(row, column): float(value.printed) for row, column, value in load().table("imagenet_main").cells()}
    rows = [row for row in csv.DictReader(StringIO(files["cells.csv"])) if row["kind"] == "against" and row["verdict"]]
    assert [(row["value"], row["verdict"], row["paper_printed"]) for row in rows] == [
        ("1.0", "outside", "37.7"),
        ("0.3", "within", "41.5"),
    ]
    for name in ("table.md", "index.html", "table.tex"):
        assert "within" in files[name]
        assert "not run" in files[name]
    facts = dict(profile.report().overview)
    assert facts["Compared with the paper"].endswith(
        "ours are: 1 within, 1 outside, 0 not comparable and 4 not run. At half the tolerance 1 would be within, at twice 2."
    )
    assert profile.report().result == (
        "ISD and MoCo v2 reach 41.8 % and 38.7 % on all queries (1-NN, student; one training each, so the difference may be due"
        " to the seed)."
    )


def test_the_overview_of_one_draw_and_one_seed(profile: Profile) -> None:
    facts = dict(profile.report().overview)
    assert facts["What was run"].startswith(
        "4 of 5 runs have scores, 4 of them trained; all 73 numbers of this page were recomputed"
    )
