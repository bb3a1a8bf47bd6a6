"""The checksums in data/ are those of the code and of the committed records."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from isd_repro.data.lists import LIST_SHA256

ROOT = Path(__file__).parents[2]
ROLES = ("train", "search", "query")
HEADS = [
    "profile",
    "subset",
    "dataset",
    "manifest_sha256",
    "classes",
    "class_list_sha256",
    "large_classes",
    "train",
    "search",
    "query",
]


def subsets() -> str:
    """A line for each subset that a committed record was made from; a class list is its sorted names, one a line."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(ROOT.glob("reports/*/records/*/pretrain.json")):
        record = json.loads(path.read_text("utf-8"))
        manifest = record["manifest"]
        classes = "".join(f"{name}\n" for name in sorted(manifest["classes"]))
        counts = [str(manifest[role]) for role in ROLES]
        digest = hashlib.sha256(classes.encode()).hexdigest()
        key = (record["profile"], manifest["subset"])
        row = [
            *(manifest["dataset"], manifest["sha256"], str(len(manifest["classes"])), digest, str(len(manifest["large"]))),
            *counts,
        ]
        assert found.setdefault(key, row) == row, f"{path}: other images than those of another run of {key}"
    return "".join("\t".join(row) + "\n" for row in [HEADS, *([*key, *row] for key, row in sorted(found.items()))])


def test_subsets_are_those_of_the_records(request: pytest.FixtureRequest) -> None:
    path = ROOT / "data" / "subsets.tsv"
    if request.config.getoption("--update-golden"):
        path.write_text(subsets(), "utf-8")
    assert path.read_text("utf-8") == subsets(), "run pytest --update-golden tests/data/test_shared_checksums.py"


def test_lists_are_those_that_the_code_knows() -> None:
    lines = (ROOT / "data" / "lists.sha256").read_text("utf-8").splitlines()
    assert {name.removesuffix(".txt"): digest for digest, name in (line.split() for line in lines)} == LIST_SHA256
