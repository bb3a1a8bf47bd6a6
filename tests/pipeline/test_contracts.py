"""What the parts promise each other: imports, sizes, dvc.yaml against code and layout, commands in the documents."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grimp
import pytest
from ruamel.yaml import YAML

from isd_repro import evaluations, methods
from isd_repro.config import reader as config
from isd_repro.config.layout import Layout
from isd_repro.report import dvc_files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "isd_repro"
PROFILES = [ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
RESULT_GROUPS = {"backbone", "method", "optim", "data", "numerics"}

# Modules that no stage lists in dvc.yaml, and why a change of them must not repeat days of training.
EXEMPT = {
    "isd_repro.records": "the format of records; every reader recomputes their scores",
    "isd_repro.tensor_files": "the format of encoder and feature files; a changed format has another number in it",
    "isd_repro.config.reader": "reads what DVC tracks as parameters",
    "isd_repro.data.contact_sheet": "pictures for a person's eye",
    "isd_repro.runtime.errors": "messages",
    "isd_repro.evaluations.summary": "shows numbers and makes none",
    "isd_repro.runtime.progress": "bars on a terminal",
    "isd_repro.runtime.archives": "whether a file is whole",
    "isd_repro.runtime.terminal": "shows numbers and makes none",
    "isd_repro.runtime.files": "how files reach the disk",
    "isd_repro.runtime.signals": "when a stage stops",
    "isd_repro.config.params": "what DVC tracks, and how manifests state it; tests/golden/defaults.json holds the defaults",
    "isd_repro.config.fields": "types of what DVC tracks as parameters",
    "isd_repro.config.layout": "where files are",
    "isd_repro.interfaces": "no logic",
    "isd_repro.provenance": "says where a number was made",
    "isd_repro.tracking": "shows numbers and makes none",
}


# `knn` reads features and labels, and no image: `extract` lists what makes features, and `knn` follows it if they differ.
MAKE_FEATURES = {
    "isd_repro.data.augment",
    "isd_repro.data.eval_loader",
    "isd_repro.data.loader",
    "isd_repro.data.store",
    "isd_repro.evaluations.features",
    "isd_repro.nn.backbones",
    "isd_repro.runtime.ranks",
}


def tree(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text("utf-8"))


STAGES: dict[str, Any] = tree(ROOT / "dvc.yaml")["stages"]
HOMES = {
    "prepare": "isd_repro.data.prepare",
    "pretrain": "isd_repro.train.pretrain",
    "report": "isd_repro.report.output",
}  # elsewhere than in stages/


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# --- the package ----------------------------------------------------------------------------------------------------


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ["torch", "torchvision", "numpy", "wandb", "dvc", "pandas", "matplotlib", "pydantic", "ruamel", "rich"]
    code = f"import isd_repro.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "command", ["show", "report", "verify --quick", f"compare {ROOT}", "wandb dashboard --dry-run sent.json"]
)
def test_a_command_that_reads_records_imports_no_torch(command: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "reports" / "demo", tmp_path / "reports" / "demo")
    for name in ("params.yaml", "dvc.yaml", "dvc.lock"):
        shutil.copy(ROOT / name, tmp_path)
    code = f"""
import atexit, sys
atexit.register(lambda: print("heavy:", sorted({{"torch", "torchvision", "isd_repro.evaluations.subject"}} & sys.modules.keys())))
from isd_repro.cli import main
sys.argv = ["isd-repro", *{command.split()}]
main()
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode in (0, 4), ended.stderr  # 4: a page or a lock that is older than the code
    assert ended.stdout.endswith("heavy: []\n")


def test_a_shell_completes_commands() -> None:
    asked = {**os.environ, "COMP_WORDS": "isd-repro pre", "COMP_CWORD": "1", "_ISD_REPRO_COMPLETE": "complete_bash"}
    code = "import sys; from isd_repro.cli import main; sys.argv[0] = 'isd-repro'; main()"
    ended = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=False)
    assert ended.stdout.split() == ["prepare", "pretrain"]


def test_packages_hold_no_logic_beside_methods() -> None:
    """`__init__` files are dependencies of no stage, so nothing that changes a number may be in one."""
    for path in sorted(PACKAGE.rglob("__init__.py")):
        if path.parent in {PACKAGE, PACKAGE / "methods", PACKAGE / "evaluations"}:  # the version; loaders of files by name
            continue
        body = ast.parse(path.read_text("utf-8")).body
        names = [node for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
        docstring = [node for node in body[:1] if isinstance(node, ast.Expr)]
        rest = [node for node in body if node not in [*names, *docstring] and not isinstance(node, ast.ImportFrom)]
        assert not rest, f"{path} holds more than a docstring and names of its modules"


# --- dvc.yaml and the code --------------------------------------------------------------------------------------------


def listed(stage: str, method: str) -> tuple[set[str], set[Path]]:
    """Modules that a stage's deps name or contain, and the folders among the deps."""
    deps = [str(dep) for dep in STAGES[stage].get("do", STAGES[stage])["deps"]]
    paths = [
        ROOT / dep.removeprefix("${root}/").replace("${item.method.name}", method)
        for dep in deps
        if dep.startswith("${root}/isd_repro")
    ]
    missing = [path for path in paths if not path.exists()]
    assert not missing, f"{stage} depends on {missing}"
    folders = {path for path in paths if path.is_dir()}
    files = {path for path in paths if path.is_file()} | {file for folder in folders for file in folder.rglob("*.py")}
    return {module_of(file) for file in files}, folders


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("isd_repro")


def needed(imports: grimp.ImportGraph, stage: str, method: str) -> set[str]:
    """What a stage imports, directly or not, with the method that it loads by name."""
    home = HOMES.get(stage, "isd_repro.evaluations.stage")
    roots = {home}
    roots |= {f"isd_repro.evaluations.{stage}"} if stage in evaluations.names() else set()
    if "isd_repro.methods" in imports.find_upstream_modules(home):
        assert method, f"{stage} loads methods, and its deps in dvc.yaml name none"
        roots.add(f"isd_repro.methods.{method}")
    found = roots.union(*(imports.find_upstream_modules(root) for root in roots))
    found |= {f"isd_repro.evaluations.{name}" for name in evaluations.names()} if stage == "report" else set()  # their columns
    packages = {module_of(path) for path in PACKAGE.rglob("__init__.py")}
    return {name for name in found - packages if name not in EXEMPT and name.rpartition(".")[0] not in EXEMPT}


def stages_and_methods() -> list[tuple[str, str]]:
    """Every stage, once for each method where it names the method's file."""
    named = {stage: "${item.method.name}" in str(body) for stage, body in STAGES.items()}
    return [(stage, method) for stage in STAGES for method in (methods.names() if named[stage] else [""])]


@pytest.mark.parametrize(("stage", "method"), stages_and_methods())
def test_a_stage_depends_on_the_modules_that_it_imports(imports: grimp.ImportGraph, stage: str, method: str) -> None:
    modules, folders = listed(stage, method)
    want = needed(imports, stage, method) - (MAKE_FEATURES if stage == "knn" else set())
    assert want <= modules, f"{stage} in dvc.yaml lacks {sorted(want - modules)}"
    inside = {module for module in modules if any((ROOT / Path(*module.split("."))).is_relative_to(folder) for folder in folders)}
    assert modules - inside <= want, f"{stage} in dvc.yaml lists {sorted(modules - inside - want)}, which it does not import"
    for folder in folders:
        name = module_of(folder / "__init__.py")
        assert any(module.startswith(name) for module in want), f"{stage} in dvc.yaml lists {folder} and imports nothing of it"


# --- dvc.yaml and the layout --------------------------------------------------------------------------------------------


def entries(raw: list[Any]) -> list[str]:
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in raw]


def resolve(text: str, values: dict[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        found: Any = values
        for part in match.group(1).split("."):
            found = found[part]
        return str(found)

    return re.sub(r"\$\{([^}]+)\}", value, text)


def expanded(values: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, list[str]]]]:
    """(stage, key, its fields with every `${...}` filled in) of a profile."""
    for stage, body in STAGES.items():
        over = resolve_list(body["foreach"], values) if "foreach" in body else {"": None}
        for key, item in over.items():
            filled = {**values, "key": key, "item": item}
            fields = {
                name: [resolve(text, filled) for text in entries(body.get("do", body).get(name, []))]
                for name in ("deps", "outs", "metrics", "params")
            }
            yield stage, key, fields


def resolve_list(text: str, values: dict[str, Any]) -> dict[str, Any]:
    found = values[text.removeprefix("${").removesuffix("}")]
    return found if isinstance(found, dict) else {item: item for item in found}


def expected_outs(stage: str, key: str, layout: Layout) -> set[Path]:
    match stage:
        case "prepare":
            return {layout.prepared(key)}
        case "pretrain":
            return {layout.encoder(key), layout.metrics(key), layout.snapshots(key), layout.record(key, "pretrain")}
        case "extract":
            return {layout.features(key)}
        case name if name in evaluations.names():
            return {layout.record(key, stage)}
        case "report":
            return {layout.report, layout.cards, layout.results / dvc_files.METRICS, (layout.results / dvc_files.CURVES).parent}
    raise AssertionError(f"dvc.yaml has a stage {stage} that this test does not know")


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parent.name)
def test_stages_write_and_read_where_the_layout_says(path: Path) -> None:
    _, layout = config.load(path)
    stages = list(expanded(tree(path)))
    made: set[Path] = set()
    for stage, key, fields in stages:
        outs = {(path.parent / out).resolve() for out in (*fields["outs"], *fields["metrics"])}
        assert outs == expected_outs(stage, key, layout), f"{stage}@{key}"
        assert not outs & made, f"{stage}@{key} writes what another stage writes"
        made |= outs
    for stage, key, fields in stages:
        data = {(path.parent / dep).resolve() for dep in fields["deps"] if "isd_repro" not in Path(dep).parts}
        assert data <= made | {layout.records}, f"{stage}@{key} depends on {sorted(data - made)}, which no stage makes"


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parent.name)
def test_tracked_parameters_are_there_and_are_those_that_change_results(path: Path) -> None:
    values = tree(path)
    for stage, key, fields in expanded(values):
        for name in fields["params"]:
            assert resolve(f"${{{name}}}", values), f"{stage}@{key} tracks {name}, which {path} lacks"
        if stage == "pretrain":
            assert set(fields["params"]) == {f"runs.{key}.{group}" for group in RESULT_GROUPS}
        assert not any(name.split(".")[0] in {"efficiency", "tracking"} for name in fields["params"])


def test_every_profile_has_the_one_pipeline() -> None:
    folders = [folder for folder in sorted((ROOT / "pipelines").iterdir()) if folder.is_dir()]
    assert {folder / "params.yaml" for folder in folders} == set(PROFILES[1:])
    for folder in folders:
        assert not (folder / "dvc.yaml").is_symlink(), "DVC reads a link in another revision as the text of its target"
        assert (folder / "dvc.yaml").read_bytes() == (ROOT / "dvc.yaml").read_bytes(), "run `make sync`"
        params, layout = config.load(folder / "params.yaml")
        assert (params.profile, layout.root) == (folder.name, ROOT)


# --- commands in the documents ------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, list[str]]]:
    """(place, words) of every command line in a fenced shell block."""
    for path in DOCUMENTS:
        fenced = False
        text = path.read_text("utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if line.startswith("```"):
                fenced = not fenced and line.removeprefix("```").strip() in {"sh", "bash", "shell", "console"}
                continue
            words = shlex.split(line.removeprefix("$ "), comments=True) if fenced else []
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and Path(words[0]).name in {"isd-repro", "dvc", "make"}:
                yield f"{path.name}: {line}", [Path(words[0]).name, *words[1:]]


def test_the_readme_shows_commands() -> None:
    assert {words[0] for place, words in commands() if place.startswith("README.md")} >= {"isd-repro", "dvc", "make"}


@pytest.mark.parametrize(("place", "words"), list(commands()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_command_in_a_document_parses(place: str, words: list[str]) -> None:
    program, *arguments = words
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
        assert {word for word in arguments if "=" not in word} <= targets, place
    elif program == "dvc":
        from dvc.cli import parse_args

        targets = set(getattr(parse_args(arguments), "targets", None) or [])
        assert all((ROOT / target.split(":")[0]).is_file() for target in targets if target.endswith("dvc.yaml")), place
    else:
        _parse_own(arguments, place)


def _parse_own(arguments: list[str], place: str) -> None:
    import typer

    from isd_repro.cli import app

    group: Any = typer.main.get_command(app)
    if arguments[0].startswith("-"):
        assert arguments[0] in {"--help", "-h", "--version"}, place
        return
    assert arguments[0] in group.commands, place
    context = group.commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))
    given = [*(context.params.get("runs") or []), *(context.params.get("subsets") or [])]
    assert set(given) <= known(), f"{place}: no profile has {sorted(set(given) - known())}"


@cache
def known() -> set[str]:
    """Names of all runs and subsets of all profiles."""
    profiles = [config.load(path)[0] for path in PROFILES]
    return {name for params in profiles for name in (*params.runs, *params.subsets)}
