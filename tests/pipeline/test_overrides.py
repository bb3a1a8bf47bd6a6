"""`dvc exp run -S key=value` changes the one value, in every profile: applied with DVC's own code to copies of the files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from isd_repro.config import writer

ROOT = Path(__file__).parents[2]
PROFILES = [ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))]


def override(path: Path, *values: str) -> str:
    """The text of a file after DVC has written the values into it."""
    from dvc.utils.hydra import apply_overrides

    apply_overrides(path, list(values))
    return path.read_text("utf-8")


def read(text: str) -> Any:
    return YAML(typ="safe").load(text)


def names(path: Path) -> str:
    return path.parent.name


@pytest.mark.parametrize("path", PROFILES, ids=names)
def test_an_override_changes_one_line_of_one_run(path: Path, tmp_path: Path) -> None:
    text = path.read_text("utf-8")
    want = read(text)
    chosen = [name for name in want["runs"] if want["runs"][name]["optim"]["epochs"]][-1]
    want["runs"][chosen]["optim"]["epochs"] = 1
    copied = tmp_path / "params.yaml"
    copied.write_text(text, "utf-8")
    after = override(copied, f"runs.{chosen}.optim.epochs=1")
    assert read(after) == want
    changed = [new for old, new in zip(text.splitlines(), after.splitlines(), strict=True) if old != new]
    assert [line.strip() for line in changed] == ["epochs: 1"]


@pytest.mark.parametrize("path", PROFILES, ids=names)
def test_a_profile_has_no_anchors(path: Path) -> None:
    """DVC writes through them: a value of one run would change in every run that shares it."""
    anchored = [event for event in YAML().parse(path.read_text("utf-8")) if getattr(event, "anchor", None) is not None]
    assert not anchored, f"{path}:{anchored[0].start_mark.line + 1} has an anchor; write the value out"


AWKWARD = {
    "text": "A long sentence of words that does not fit into a line of a parameter file: it has a colon, 'quotes' and a # in it.",
    "broken": "two\nlines that are long enough to be folded, if only folding kept their break where it is, which it does not do",
    "word": "x" * 200,
    "empty": {},
    "list": [],
    "numbers": [1, 1.0, 1e-4, True, "1", "no", ""],
    "deep": {
        "block": {"name": "isd", "tau_student": 0.1, "tau_teacher": 0.02, "notes": ["a" * 60, "b " * 60 + "c", {"d": ["e" * 70]}]}
    },
}


@pytest.mark.parametrize(
    "tree", [AWKWARD, *(read(path.read_text("utf-8")) for path in PROFILES[:3])], ids=["awkward", "demo", "gate", "tuning"]
)
def test_what_is_written_reads_back_and_stays_when_dvc_writes_it_again(tree: Any, tmp_path: Path) -> None:
    shared = copy.deepcopy(tree) | {"again": tree}
    text = writer.dump(writer.styled(shared))
    assert read(text) == shared
    assert max(len(line) for line in text.splitlines() if "x" * 200 not in line) <= 120
    path = tmp_path / "params.yaml"
    path.write_text(text, "utf-8")
    assert override(path, "+new=1") == text + "new: 1\n"
