"""The comparing half of DVC, experiments and remotes, as docs/dvc.md shows them, on a profile of two small runs."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.test_repro import BIN, IDENTITY, ROOT, change, clone, ran, shell  # noqa: F401 - a fixture

SCORE = "student/1-NN/all"


def dvc(folder: Path, *words: str) -> str:
    """What a command of DVC prints; it must end with 0."""
    return shell(folder, "dvc", *words, env={"GIT_AUTHOR_NAME": "test", "GIT_AUTHOR_EMAIL": "test@localhost", **COMMITTER})


COMMITTER = {"GIT_COMMITTER_NAME": "test", "GIT_COMMITTER_EMAIL": "test@localhost"}


def parsed(text: str) -> Any:
    """The JSON in what a command prints, without progress before it and hints after it."""
    at = min(place for place in (text.find("{"), text.find("[")) if place >= 0)
    return json.JSONDecoder().raw_decode(text[at:])[0]


def commit(folder: Path, words: str) -> None:
    shell(folder, "git", "add", ".")
    shell(folder, "git", *IDENTITY, "commit", "--quiet", "-m", words)


def recorded(folder: Path) -> float:
    record = json.loads((folder / "reports/demo/records/isd/knn.json").read_text("utf-8"))
    (score,) = (s for s in record["scores"] if (s["encoder"], s["metric"], s["group"]) == ("student", "1-NN", "all"))
    return round(100 * float(score["correct"]) / float(score["n"]), 4)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a plain HTTP server shows a folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_runs_are_compared_tried_out_and_published(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> None:  # noqa: F811
    change(clone, "runs", "isd", "optim", "epochs", value=1)
    change(clone, "linear_runs", value=[])
    commit(clone, "smaller")
    dvc(clone, "repro")
    commit(clone, "results")
    first = recorded(clone)

    # What stands there.
    shown = parsed(dvc(clone, "metrics", "show", "--json"))[""]["data"]["reports/demo/metrics.json"]["data"]
    assert shown["isd"][SCORE] == first
    assert set(shown) == {"untrained", "isd"}
    vega = parsed(dvc(clone, "plots", "show", "--show-vega", "Training loss"))
    assert [(row["run"], row["epoch"]) for row in vega["data"]["values"]] == [("isd", "1")]
    assert parsed(dvc(clone, "plots", "show", "--show-vega", "Top-1 accuracy"))["spec"]["encoding"]["x"]["field"] == "top-1"
    assert dvc(clone, "data", "status").strip() == "No changes."
    assert "runs/isd/encoder.safetensors" in dvc(clone, "diff", "HEAD~1", "--json")

    # An experiment in the workspace: one parameter of one run.
    done = dvc(clone, "exp", "run", "-n", "warmer", "-S", "runs.isd.method.tau_teacher=0.05")
    assert ran(done) == {"pretrain@isd", "extract@isd", "knn@isd", "report"}
    second = recorded(clone)
    (told,) = parsed(dvc(clone, "params", "diff", "--json"))["params.yaml"].items()
    assert (told[0], told[1]["old"], told[1]["new"]) == ("runs.isd.method.tau_teacher", 0.0185, 0.05)
    difference = parsed(dvc(clone, "metrics", "diff", "--json"))["reports/demo/metrics.json"]
    assert {key.split(".")[0] for key in difference} == {"isd"}
    assert difference[f"isd.{SCORE}"]["diff"] == pytest.approx(second - first)
    vega = parsed(dvc(clone, "plots", "diff", "HEAD", "--targets", "Training loss", "--show-vega"))
    assert {row["rev"] for row in vega["data"]["values"]} == {"HEAD", "workspace"}
    shell(clone, "git", "checkout", "--quiet", ".")
    dvc(clone, "checkout", "dvc.yaml")
    assert ran(dvc(clone, "repro")) == set()

    # One in the queue, which runs in a folder of its own.
    dvc(clone, "exp", "run", "--queue", "-n", "cooler", "-S", "runs.isd.method.tau_teacher=0.01")
    dvc(clone, "exp", "run", "--run-all")
    assert recorded(clone) == first
    rows = {row["Experiment"]: row for row in table(dvc(clone, "exp", "show", "--csv", "--only-changed"))}
    assert {name: float(rows[name]["runs.isd.method.tau_teacher"]) for name in ("warmer", "cooler")} == {
        "warmer": 0.05,
        "cooler": 0.01,
    }
    assert float(rows["warmer"][f"isd.{SCORE}"]) == second
    dvc(clone, "exp", "apply", "cooler")
    changed = [line for line in shell(clone, "git", "diff", "-U0", "params.yaml").splitlines() if line[:1] in "+-"][2:]
    assert [line.split(":")[1] for line in changed] == [" 0.0185", " 0.01"], "one line of the file, and no other"
    shell(clone, "git", "checkout", "--quiet", ".")
    dvc(clone, "checkout", "dvc.yaml")

    # Encoders to a remote, and from it over HTTP into a clone, where they reproduce the stored predictions.
    store = tmp_path_factory.mktemp("remote")
    dvc(clone, "remote", "add", "--local", "-d", "store", str(store))
    dvc(clone, "push", "--glob", "runs/*/encoder.safetensors")
    fresh = tmp_path_factory.mktemp("fresh") / "clone"
    shell(clone, "git", "clone", "--quiet", str(clone), str(fresh))
    with served(store) as address:
        dvc(fresh, "remote", "add", "--local", "-d", "web", address)
        for name in ("requirements.lock", "pyproject.toml", "installed"):  # an environment that is up to date
            (fresh / name).touch()
        shell(fresh, "make", "pull", "STAMP=installed", f"BIN={BIN}")
    for run in ("untrained", "isd"):
        name = f"runs/{run}/encoder.safetensors"
        assert (fresh / name).read_bytes() == (clone / name).read_bytes()
    dvc(fresh, "repro", "-s", "dvc.yaml:prepare")
    shell(fresh, "sh", "-c", "isd-repro verify --json > verify.json")
    verified = json.loads((fresh / "verify.json").read_text("utf-8"))
    assert verified["ok"]
    assert {n["verdict"] for n in verified["numbers"] if n["kind"] == "score"} == {"re-evaluated"}

    # A shared cache restores everything without a remote.
    dvc(fresh, "cache", "dir", "--local", os.fspath(clone / ".dvc" / "cache"))
    dvc(fresh, "checkout", "dvc.yaml")
    assert ran(dvc(fresh, "repro")) == set()


def table(text: str) -> list[dict[str, str]]:
    import csv

    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("Experiment,"))
    rows = list(csv.DictReader(lines[at:]))
    return [{**row, "Experiment": row["Experiment"] or row["rev"]} for row in rows]
