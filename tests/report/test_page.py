"""The files: escapes, self-containedness, determinism, provenance, and what the terminal prints."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from unittest.mock import patch

import pytest
from rich.console import Console

from isd_repro.report import text
from isd_repro.report.cells import Cell, Column, Row, Table
from isd_repro.report.output import report, show
from isd_repro.report.run_details import cell_facts
from isd_repro.report.scores import mean_cell, score_cell
from isd_repro.runtime.errors import UserError
from tests.report import synthetic
from tests.report.conftest import ODD, Profile


def test_page_loads_nothing(profile: Profile) -> None:
    html = profile.files()["index.html"]
    html = re.sub(r'src="data:image/svg\+xml,[^"]*"', "", html)  # a chart in an <img> loads nothing, whatever it holds
    assert not re.search(
        r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(|\bsrc(set)?=|<(link|iframe|object|embed|base)\b", html
    )
    assert "default-src 'none'" in html


def test_page_links_and_ids(profile: Profile) -> None:
    html = profile.files()["index.html"]
    ids, links = re.findall(r'<[^>]*\bid="(.*?)"', html), re.findall(r'<a [^>]*\bhref="(.*?)"', html)
    assert len(ids) == len(set(ids)) > 10
    for link in links:
        if link.startswith("#"):
            assert link[1:] in ids
        elif link.startswith("../records/"):
            assert (profile.layout.report / link).resolve().is_file()
    assert "../../../DEVIATIONS.md" in links
    assert (profile.layout.report / "../../../DEVIATIONS.md").resolve() == (profile.layout.root / "DEVIATIONS.md").resolve()


def test_every_number_opens_its_provenance(profile: Profile) -> None:
    report_of = profile.report()
    html = profile.files()["index.html"]
    cells = re.findall(r'<a class="cell"[^>]*>', html)
    assert len(cells) == sum(
        bool(cell.runs) and cell.kind != "none" for t in report_of.tables for row in t.shown for cell in row.cells
    )
    first = next(cell for cell in cells if 'href="#run-isd"' in cell)
    facts = dict(json.loads(re.findall(r"data-facts='(.*?)'", first)[0]))
    score = report_of.tables[0].shown[3].cells[0]
    assert facts["Score"] == f"{score.value:.2f} %: {score.correct} of 500 queries"
    assert facts["Verification"] == "recomputed from stored predictions"
    assert facts["Made by"] == "isd-repro knn isd"
    for value in (
        synthetic.sha("encoder", "isd"),
        synthetic.sha("manifest", "small"),
        profile.records().runs["isd"].pretrain.fingerprint,  # type: ignore[union-attr]
        "5" * 40,
    ):
        assert value in html


def test_tables_speak_to_a_screen_reader(profile: Profile) -> None:
    """A caption for each table, a scope for each head, a sort state and a name for each button, and a place to hear of it."""
    html = profile.files()["index.html"]
    tables = re.findall(r"<table.*?</table>", html, flags=re.DOTALL)
    assert len(tables) == 4
    for table in tables:
        assert len(re.findall(r"<caption", table)) == 1
        heads = re.findall(r"<th\b[^>]*>", table)
        assert heads
        assert all(re.search(r'scope="(col|row|colgroup)"', head) for head in heads)
        if "sortable" not in table.partition(">")[0]:
            assert "<button" not in table
            continue
        sorted_by = [head for head in heads if 'scope="col"' in head]
        assert len(sorted_by) == table.count("<button") > 1
        assert all('aria-sort="none"' in head for head in sorted_by)
        names = re.findall(r'<button type="button" aria-label="([^"]+)"', table)
        assert len(names) == len(set(names)) == len(sorted_by) - 1
    assert re.search(r'<p class="heard" role="status" id="sorted">', html)


def test_the_result_comes_first_and_its_figure_before_the_table(profile: Profile) -> None:
    files, result = profile.files(), profile.report().result
    assert result.startswith("ISD and MoCo v2 reach ")
    page, markdown = files["index.html"], files["table.md"]
    assert page.index("ISD and MoCo v2 reach") < page.index("<figure") < page.index("<table")
    assert markdown.index("ISD and MoCo v2 reach") < markdown.index("| Run (one seed each) |")
    tree = json.loads(files["cells.json"])
    assert (tree["result"], tree["at_a_glance"][0][0]) == (result, "What was run")


def test_a_mean_lists_the_values_behind_it(profile: Profile) -> None:
    records = profile.records()
    cells = [score_cell(records.runs[run], "student", "1-NN", "all") for run in ("moco", "isd")]
    facts = dict(cell_facts(records, mean_cell(cells, "seeds"), "pipelines/x"))
    assert facts["Values"] == f"moco {cells[0].value:.2f}, isd {cells[1].value:.2f}"
    assert facts["Made by"].startswith("isd-repro knn RUN -p pipelines/x/params.yaml for each of these runs")


def test_a_class_has_its_wordnet_name_where_it_is_known() -> None:
    assert text.class_name("n01770393") == "n01770393 (scorpion)"
    assert text.class_name("7") == "7"


def test_the_seeds_of_a_method_follow_its_mean() -> None:
    alone, *seeds = [Row(run, (Cell("score", (run,), value=1.0),), run) for run in ("pixels", "isd-0", "isd-1")]
    mean = Row("ISD, 2 seeds", (Cell("mean", ("isd-0", "isd-1"), value=1.0, count=2),))
    last = Row("Mean", (Cell("mean", (), value=1.0),))
    table = Table("t", "T", "Run", (Column("", "1-NN"),), (alone, *seeds), (mean, last))
    assert table.groups == [(alone, ()), (mean, tuple(seeds))]
    assert table.last == (last,)


def test_rows_without_a_number_are_named_and_not_shown(profile: Profile) -> None:
    student, teacher = profile.report().tables[:2]
    assert [row.label for row in student.shown] == ["Untrained", "Raw pixels", "MoCo v2", "ISD"]
    assert student.absent == (ODD,)
    assert [row.label for row in teacher.shown] == ["MoCo v2", "ISD"], "the others have no teacher"
    assert "Not run: BYOL" in profile.files()["index.html"]


def test_labels_are_escaped_in_every_format(profile: Profile) -> None:
    files = profile.files()
    assert "BYOL | 50 % &amp; &lt;b&gt;_x_&lt;/b&gt;" in files["index.html"]
    assert ODD not in files["index.html"]
    assert r"BYOL \| 50 % &amp; \<b\>\_x\_\</b\>" in files["table.md"]
    assert r"BYOL \textbar{} 50 \% \& \textless{}b\textgreater{}\_x\_\textless{}/b\textgreater{}" in files["table.tex"]
    for name, content in files.items():
        if name.endswith(".svg"):
            ET.fromstring(content)  # well-formed in spite of the label


@pytest.mark.parametrize(
    ("raw", "tex", "md"),
    [
        ("a|b*c_d&e%f#g", r"a\textbar{}b\textasteriskcentered{}c\_d\&e\%f\#g", r"a\|b\*c\_d&amp;e%f\#g"),
        ("~^\\{}", r"\textasciitilde{}\textasciicircum{}\textbackslash{}\{\}", r"\~\^\\\{\}"),
        ("<5 > $4", r"\textless{}5 \textgreater{} \$4", r"\<5 \> \$4"),
        ("1 ± 2 \N{EN DASH} \N{MINUS SIGN}3", r"1 $\pm$ 2 -- $-$3", "1 ± 2 \N{EN DASH} \N{MINUS SIGN}3"),
        ("two\nlines", "two lines", "two lines"),
        ("1. no list", "1. no list", r"1\. no list"),
        ("- no list", "- no list", r"\- no list"),
        ("46.8", "46.8", "46.8"),
        ("--- no rule", "--- no rule", r"\--- no rule"),
        ("`code` [a](b)", "`code` {[}a](b)", r"\`code\` \[a\](b)"),
    ],
)
def test_escapes(raw: str, tex: str, md: str) -> None:
    assert text.latex(raw) == tex
    assert text.markdown(raw) == md


@pytest.mark.parametrize("words", ["=1", "+1", "-1", "@x", "\uff1d1", "\uff0b1", "\uff0d1", "\uff20x", " =1", "'=1"])
def test_no_spreadsheet_takes_a_label_for_a_formula(words: str) -> None:
    """Neither where a comma separates cells nor where a semicolon does."""
    sign = words.strip(" '")
    assert text.csv_cell(words).endswith(f"'{sign}")
    assert text.csv_cell(f"a; {words}").endswith(f"'{sign}")
    assert text.csv_cell(f"a {sign}") == f"a {sign}"


def test_markdown_tables_are_rectangular(profile: Profile) -> None:
    blocks = re.findall(r"(?:^\|.*\|\n)+", profile.files()["table.md"], flags=re.MULTILINE)
    assert len(blocks) == 5
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


def test_cells_files_agree_with_the_table(profile: Profile) -> None:
    files = profile.files()
    tree = json.loads(files["cells.json"])
    rows = list(csv.DictReader(StringIO(files["cells.csv"])))
    assert len(rows) == len(tree["cells"]) == 2 * 5 * (6 + 2) + 5 * 5
    for row, cell in zip(rows, tree["cells"], strict=True):
        assert row["value"] == ("" if cell["value"] is None else str(cell["value"]))
    scores = [cell for cell in tree["cells"] if cell["kind"] == "score"]
    assert len(scores) == 4 * 6 + 2 * 6
    for cell in scores:
        (record,) = cell["records"]
        stated = json.loads((profile.layout.report / record).resolve().read_text())["scores"]
        keys = ("encoder", "metric", "group", "correct", "n")
        assert {key: cell[key] for key in keys} in [{key: score[key] for key in keys} for score in stated]
    assert tree["runs"]["isd"]["parts"]["knn"]["encoder_sha256"] == synthetic.sha("encoder", "isd")
    assert str(profile.layout.root) not in files["cells.json"]


RENDER = """
import sys
from pathlib import Path
from unittest.mock import patch
from isd_repro.report import page, run_records
from tests.report.conftest import Profile
from isd_repro.config.params import Params
from tests.report import synthetic
root = Path(sys.argv[1])
params = Params.model_validate_json((root / "params.json").read_text())
for name, content in page.render(Profile(params, synthetic.layout(root, params)).report()).items():
    (Path(sys.argv[2]) / name).write_bytes(content)
"""


def test_a_second_render_is_byte_equal(profile: Profile, tmp_path: Path) -> None:
    """In another process, with other hash seeds, another working folder and another locale."""
    (tmp_path / "params.json").write_text(profile.params.model_dump_json())
    first = profile.files()
    plain = {"index.html", "table.md", "table.tex", "cells.json", "cells.csv", "loss-curves.svg"}
    plain |= {f"{name}-small.svg" for name in ("scores", "classes", "sizes", "confusions")}
    assert plain | {"render.json"} == set(first)
    out = tmp_path / "again"
    out.mkdir()
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "77",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "LC_ALL": "C",
        "TZ": "Asia/Tokyo",
    }
    subprocess.run([sys.executable, "-c", RENDER, str(tmp_path), str(out)], env=environment, cwd=tmp_path, check=True)
    for name, content in first.items():
        assert (out / name).read_bytes() == content.encode(), name
        assert str(profile.layout.root) not in content, name
        assert set(re.findall(r"20\d\d-\d\d-\d\d", content)) <= {"2026-01-02"}, f"{name}: a time of rendering"


def test_stage_writes_and_prints(profile: Profile, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(profile.layout.root)
    stale = profile.layout.report / "scores-gone.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    report(profile.params, profile.layout, Console(stderr=True))
    assert capsys.readouterr().out == f"{(profile.layout.report / 'index.html').resolve().as_uri()}\n"
    assert {path.name for path in profile.layout.report.iterdir()} == set(profile.files())
    before = {path: path.read_bytes() for path in profile.layout.report.iterdir()}
    show(profile.params, profile.layout, wide=True)
    printed = capsys.readouterr().out
    lines = printed.rstrip().splitlines()
    for row in profile.report().tables[0].shown:
        cells = [cell.plain for cell in row.cells]
        assert any(line.strip().startswith(f"{row.label} ") and all(cell in line for cell in cells) for line in lines)
    assert lines[-2] == profile.report().result
    assert "\x1b" not in printed
    assert lines[-1] == (profile.layout.report / "index.html").resolve().as_uri()
    assert {path: path.read_bytes() for path in profile.layout.report.iterdir()} == before


@pytest.mark.parametrize("width", [60, 80])
def test_show_fits_the_terminal_and_breaks_no_number(profile: Profile, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    with patch("sys.stdout", StringIO()) as stream:
        show(profile.params, profile.layout, metric="20-NN")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert max(map(len, lines)) <= width
    table = profile.report().tables[0]
    at = next(at for at, cell in enumerate(table.shown[-1].cells) if cell.metric == "20-NN")
    for row in table.shown:
        assert any(row.label.split()[0] in line and row.cells[at].plain in line for line in lines)


def test_a_metric_that_no_table_has_is_named(profile: Profile) -> None:
    with pytest.raises(UserError, match="--metric 5-NN: no table of profile 'synthetic' has it"):
        show(profile.params, profile.layout, metric="5-NN")


def test_terminal_without_unicode(profile: Profile) -> None:
    written = BytesIO()
    with patch("sys.stdout", TextIOWrapper(written, encoding="ascii")) as out:
        show(profile.params, profile.layout)
        out.flush()
    assert re.search(rb"ISD[ |]+\d\d\.\d \+- \d\.\d", written.getvalue())


def test_only_rendering_imports_the_libraries_that_render() -> None:
    code = "import sys; import isd_repro.report.page; print({'matplotlib', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (8.44, "8.4 s"), (200, "3 min 20 s"), (3599.7, "1 h 00 min"), (18420, "5 h 07 min"), (59.97, "1 min 00 s")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert text.duration(seconds) == shown
