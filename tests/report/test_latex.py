"""LaTeX of the committed reports: structure everywhere, and compiled where pdflatex is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from isd_repro.config import reader as config
from isd_repro.report import page, run_records, text
from isd_repro.report.cells import Cell, Column, Row, Table
from isd_repro.report.templating import panels
from tests.report.conftest import Profile

ROOT = Path(__file__).parents[2]
ALL = [ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))]
PROFILES = [path for path in ALL if (config.load(path)[1].report / "table.tex").is_file()]
TABULAR = re.compile(r"\\begin\{tabular\}\{@\{\}l(r+)@\{\}\}(.*?)\\end\{tabular\}", flags=re.DOTALL)
DOCUMENT = "\\documentclass{article}\n\\usepackage{booktabs,graphicx}\n\\begin{document}\n\\input{table.tex}\n\\end{document}\n"


@cache
def tex_of(path: Path) -> tuple[str, list[Table]]:
    """The committed file, which a test of `verify` compares with a fresh render, and the tables that it shows."""
    params, layout = config.load(path)
    report = page.assemble(params, run_records.load(params, layout), layout)
    return (layout.report / "table.tex").read_text("utf-8"), report.tables


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parent.name)
def test_structure(path: Path) -> None:
    """As many floats as tables, panels as wide as their columns and together as wide as the table, everything closed."""
    tex, tables = tex_of(path)
    floats = re.findall(r"\\begin\{table\}.*?\\end\{table\}", tex, flags=re.DOTALL)
    assert len(floats) == len(tables)
    for block, table in zip(floats, tables, strict=True):
        parts = TABULAR.findall(block)
        assert sum(len(columns) for columns, _ in parts) == len(table.columns)
        for columns, body in parts:
            rows = [line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
            assert len(rows) == 1 + len(table.shown) + len(table.foot)
            assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {len(columns)}
            assert sum(map(int, re.findall(r"\\multicolumn\{(\d+)\}", body))) == len(columns)
            for rule in (r"\toprule", r"\bottomrule"):
                assert body.count(rule) == 1
    assert len(set(re.findall(r"\\label\{(.*?)\}", tex))) == len(tables)
    for name in ("table", "tabular", "itemize", "minipage"):
        assert tex.count(f"\\begin{{{name}}}") == tex.count(f"\\end{{{name}}}")
    depth = 0
    for sign in re.sub(r"\\[{}]", "", tex):
        depth += (sign == "{") - (sign == "}")
        assert depth >= 0
    assert depth == 0


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parent.name)
def test_nothing_is_left_unescaped(path: Path) -> None:
    tex = "\n".join(line for line in tex_of(path)[0].splitlines() if not line.startswith("%"))
    assert tex.isascii()
    assert not re.search(r"(?<!\\)[#~^\"|<](?!\\)", re.sub(r"\\ifdim\\wd0>\\linewidth", "", tex).replace("}%\n", "}\n"))
    assert not re.search(r"(?<!\\)%", tex.replace("}%\n", "}\n"))
    assert not re.search(r"(?<!\\)_", re.sub(r"\\label\{.*?\}", "", tex))


def test_panels_are_cut_between_shared_heads() -> None:
    """Twelve columns in three groups of four: a panel each; ten columns stay together."""
    columns = tuple(Column(span, f"{at}") for span in "ABC" for at in range(4))
    rows = (Row("one", tuple(Cell("score", value=float(at)) for at in range(12))),)
    table = Table("t", "T", "Run", columns, rows)
    parts = panels(table)
    assert [[column.span for column in part.columns] for part in parts] == [["A"] * 4, ["B"] * 4, ["C"] * 4]
    assert [[cell.value for cell in part.rows[0].cells] for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert panels(Table("t", "T", "Run", columns[:10], ())) == [Table("t", "T", "Run", columns[:10], ())]


def compiled(folder: Path, tex: str) -> str:
    """The log of a compilation that succeeded without a line too wide."""
    if not shutil.which("pdflatex"):
        pytest.skip("pdflatex is not installed")
    (folder / "table.tex").write_text(tex, "utf-8")
    (folder / "report.tex").write_text(DOCUMENT)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "report.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (folder / "report.pdf").stat().st_size > 10_000
    return done.stdout


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parent.name)
def test_it_compiles(tmp_path: Path, path: Path) -> None:
    log = compiled(tmp_path, tex_of(path)[0])
    wide = [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt too wide\)", log)]
    assert max(wide, default=0.0) < 10
    assert "undefined" not in log.replace("undefined references", "")


def test_an_odd_label_compiles(tmp_path: Path, profile: Profile) -> None:
    letters = text.latex("Größe, é, ż, Ångström, ł, ø, œ, “x” ‘y’ … — × · °, τ and Δ")
    compiled(tmp_path, profile.files()["table.tex"].replace("MoCo v2", letters))
