"""LaTeX of whole reports: structure everywhere, and compiled where pdflatex is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import unicodedata
from functools import cache
from pathlib import Path

import pytest

from isd_repro.config import reader as config
from isd_repro.report import page, run_records, text
from isd_repro.report.cells import Cell, Column, Row, Table
from isd_repro.report.templating import panels
from tests.report.conftest import Profile

ROOT = Path(__file__).parents[2]
PROFILES = [ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))]
TABULAR = re.compile(r"\\begin\{tabular\}\{@\{\}l(r+)@\{\}\}(.*?)\\end\{tabular\}", flags=re.DOTALL)
DOCUMENT = "\\documentclass{article}\n\\usepackage{booktabs,graphicx}\n\\begin{document}\n\\input{table.tex}\n\\end{document}\n"


@cache
def tex_of(path: Path) -> tuple[str, list[Table]]:
    params, layout = config.load(path)
    report = page.assemble(params, run_records.load(params, layout), layout)
    return page.render(report)["table.tex"].decode(), report.tables


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


def test_accents_of_the_default_encoding_become_commands() -> None:
    assert text.latex("Größe, é, ż, Ångström, “x”") == r"Gr\"{o}\ss{}e, \'{e}, \.{z}, \r{A}ngstr\"{o}m, ``x''"


@pytest.mark.parametrize("label", ["\u732b", "\u05d7\u05ea\u05d5\u05dc", "e\u0329", "\u043a\u043e\u0442"])
def test_letters_beyond_latin_stop_pdflatex_with_a_remedy(label: str, tmp_path: Path) -> None:
    """They are kept for LuaLaTeX and XeLaTeX; a file without them has no such guard."""
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text("utf-8").replace("label: ISD", f"label: ISD {label}"), "utf-8")
    tex = tex_of(path)[0]
    assert unicodedata.normalize("NFC", label) in tex
    guard = next(line for line in tex.splitlines() if not line.startswith("%"))
    assert guard.startswith(r"\ifdefined\XeTeXversion\else\ifdefined\directlua\else\errmessage{")
    assert "use LuaLaTeX or XeLaTeX" in guard
    assert guard.isascii()
    assert r"\errmessage" not in tex_of(ROOT / "params.yaml")[0]


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


@pytest.mark.parametrize("engine", ["lualatex", "xelatex", "pdflatex"])
def test_a_label_beyond_latin_compiles_where_it_can(engine: str, tmp_path: Path) -> None:
    if not shutil.which(engine):
        pytest.skip(f"{engine} is not installed")
    (tmp_path / "table.tex").write_text(text.latex_file("ISD \u732b"), "utf-8")
    (tmp_path / "report.tex").write_text(DOCUMENT)
    command = [engine, "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "report.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert (done.returncode == 0) == (engine != "pdflatex"), done.stdout[-2000:]
    assert engine != "pdflatex" or "use LuaLaTeX or XeLaTeX" in done.stdout.replace("\n", "")


def test_an_odd_label_compiles(tmp_path: Path, profile: Profile) -> None:
    compiled(tmp_path, profile.files()["table.tex"])
