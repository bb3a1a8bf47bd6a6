"""Everything that can be changed behind a number's back is caught, and named by file and key."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.data.prepare import prepare
from isd_repro.records import pack_labels, unpack_labels
from isd_repro.runtime.files import sha256_file
from isd_repro.tensor_files import load_tensors, save_tensors
from tests.verify import world
from tests.verify.world import RECORDS, Profile, write_lock

TABLES = "reports/tiny/tables"
Change = Callable[[dict[str, Any]], Any]


# --- records --------------------------------------------------------------------------------------------------------


def test_a_tampered_metric(clean: Profile) -> None:
    stated: list[int] = []

    def change(tree: dict[str, Any]) -> None:
        score = next(s for s in tree["scores"] if (s["encoder"], s["metric"], s["group"]) == ("teacher", "5-NN", "rare"))
        stated.append(score["correct"])
        score["correct"] += 2

    clean.edit(clean.record("isd", "knn"), change)
    answer = clean.verify()
    one = answer.caught(f"{RECORDS}/isd/knn.json", "scores[teacher 5-NN rare]", "restore it from git")
    assert one["found"] == f"{stated[0] + 2} of 24"
    assert one["expected"] == f"{stated[0]} of 24, from its predictions"
    assert answer.verdicts(run="isd", encoder="teacher", metric="5-NN", group="rare") == {"failed"}
    assert answer.verdicts(run="isd", encoder="teacher", metric="5-NN", group="all") == {"recomputed"}
    assert answer.verdicts(run="moco", kind="score") == {"recomputed"}


def test_a_tampered_prediction_that_changes_no_score(profile: Profile) -> None:
    """Only the encoder can tell."""
    path, at = profile.record("moco", "knn"), []
    profile.edit(path, lambda tree: at.append(world.swap_wrong(tree, "teacher/5-NN")))
    profile.report()
    assert profile.verify("--quick").code == 0
    answer = profile.verify()
    one = answer.caught(f"{RECORDS}/moco/knn.json", f"predictions['teacher/5-NN'][{at[0]}]")
    assert "1 of 30 predictions differ" in one["expected"]
    assert answer.verdicts(run="moco", metric="5-NN") == {"failed"}


def test_tampered_labels(profile: Profile) -> None:
    """Labels and predictions of all runs moved alike, so that every score and every pair of records still agrees."""

    def change(tree: dict[str, Any]) -> None:
        tree["labels"] = pack_labels(unpack_labels(tree["labels"])[::-1])
        tree["predictions"] = {key: pack_labels(unpack_labels(packed)[::-1]) for key, packed in tree["predictions"].items()}

    for run, part in (("untrained", "knn"), ("moco", "knn"), ("isd", "knn"), ("isd", "linear")):
        profile.edit(profile.record(run, part), change)
    profile.report()
    assert profile.verify("--quick").code == 0
    answer = profile.verify()
    for run in ("untrained", "moco", "isd"):
        one = answer.caught(f"{RECORDS}/{run}/knn.json", "labels[0]")
        assert (one["found"], one["expected"]) == ("9", "0, as the manifest's images say")
    assert answer.verdicts() == {"failed"}


def test_a_record_copied_from_another_run(clean: Profile) -> None:
    shutil.copy(clean.record("moco", "knn"), clean.record("isd", "knn"))
    answer = clean.verify()
    assert answer.caught(f"{RECORDS}/isd/knn.json", "run")["found"] == "'moco'"
    answer.caught(f"{RECORDS}/isd/knn.json", "encoder_sha256", "the records come from different runs")
    answer.caught(f"{RECORDS}/isd/linear.json", "features_sha256")
    assert answer.verdicts(run="isd") == {"failed"}, "knn and linear name different features: which is right is not known"
    assert answer.verdicts(run="moco", kind="score") == {"recomputed"}


def test_a_whole_run_copied_and_renamed(profile: Profile) -> None:
    """Record, encoder and features of MoCo under ISD's name, every field that holds a name rewritten."""
    for part in ("pretrain", "knn"):
        shutil.copy(profile.record("moco", part), profile.record("isd", part))
        profile.edit(profile.record("isd", part), lambda tree: tree.update(run="isd"))
    profile.edit(profile.record("isd", "pretrain"), lambda tree: tree.update(label="ISD"))
    profile.record("isd", "linear").unlink()
    for name in ("encoder.safetensors", "features.safetensors"):
        shutil.copy(profile.folder / "runs/moco" / name, profile.folder / "runs/isd" / name)
    answer = profile.verify()
    assert answer.caught("params.yaml", "runs.isd.method.name")["expected"] == "moco, as the record says"
    answer.caught(f"{RECORDS}/isd/pretrain.json", "encoder_sha256", "copy")
    assert answer.caught("runs/isd/encoder.safetensors", "run")["found"] == "moco"
    assert answer.verdicts(run="isd") == {"failed"}


def test_a_damaged_record(clean: Profile) -> None:
    clean.record("isd", "pretrain").write_text("{}", encoding="utf-8")
    clean.record("isd", "knn").write_text("[", encoding="utf-8")
    answer = clean.verify()
    assert "fingerprint: Field required" in answer.caught(f"{RECORDS}/isd/pretrain.json", "form")["found"]
    answer.caught(f"{RECORDS}/isd/knn.json", "form")
    assert answer.verdicts(run="isd") == {"failed"}, "also numbers that only the page still shows"


def first_point(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tree["points"][0]
    return found


def target(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tree["evaluations"][0]
    return found


ROUNDS: list[dict[str, tuple[Change, str]]] = [  # what cannot be by what the same or another record says; one change a record
    {
        "pretrain": (lambda tree: tree["curve"][0].update(epoch=7), "curve's epochs"),
        "knn": (lambda tree: tree.update(protocol="1-NN of the best of ten searches"), "protocol"),
        "linear": (lambda tree: tree["settings"]["best_epoch"].update(student=99), "settings.best_epoch"),
        "transfer": (lambda tree: target(tree)["manifest"].update(dataset="CIFAR-10"), "cifar10-folder: manifest.dataset"),
        "trajectory": (lambda tree: tree.update(protocol="9-NN"), "protocol"),
        "few_label": (lambda tree: tree.update(protocol="linear, paper, on the labelled images alone"), "protocol"),
    },
    {
        "pretrain": (lambda tree: tree["provenance"].update(source="0" * 64), "sources"),
        "knn": (lambda tree: tree["settings"].update(k="many"), "settings"),
        "linear": (lambda tree: tree.update(protocol="paper"), "protocol"),
        "transfer": (lambda tree: target(tree).update(metric="mean-per-class"), "cifar10-folder: metric"),
        "trajectory": (
            lambda tree: first_point(tree)["scores"].append(first_point(tree)["scores"][0]),
            "epoch 1: scores stated twice",
        ),
        "few_label": (lambda tree: tree["settings"]["labelled"].pop("25"), "settings"),
    },
    {
        "pretrain": (lambda tree: tree["config"]["optim"].update(lr=0.5), "fingerprint"),
        "linear": (lambda tree: tree["settings"].update(epochs="all"), "settings"),
        "transfer": (lambda tree: target(tree).update(protocol="fine-tuned"), "cifar10-folder: protocol"),
        "trajectory": (lambda tree: first_point(tree)["scores"][0].update(correct=1, n=2), "epoch 1: queries of other groups"),
        "few_label": (lambda tree: tree["settings"].pop("fractions"), "settings"),
    },
    {
        "pretrain": (lambda tree: tree["config"].update(manifest="0" * 64), "config.manifest"),
        "transfer": (lambda tree: tree["settings"].pop("sets"), "sets"),
    },
    {"pretrain": (lambda tree: tree["curve"].append(tree["curve"][0]), "curve")},
    {"pretrain": (lambda tree: tree.update(encoders=["student"]), ""), "knn": (lambda _: None, "encoders with scores")},
]


@pytest.mark.parametrize("changes", ROUNDS, ids=range(len(ROUNDS)))
def test_what_cannot_be(protocols: Profile, changes: dict[str, tuple[Change, str]]) -> None:
    """Every fault is named, however many there are."""
    for part, (change, _) in changes.items():
        protocols.edit(protocols.record("isd", part), change)
    answer = protocols.verify("--quick")
    for part, (_, key) in changes.items():
        assert not key or "isd" in answer.caught(f"{RECORDS}/isd/{part}.json", key)["runs"]


def test_names_in_records_of_other_protocols_are_words(protocols: Profile) -> None:
    """No markup, no LaTeX and no formula comes out of them; `verify` refuses a set that is none of the project's."""
    name = "=1+1<script>alert(1)</script>\\input{x}|`$"
    for run in ("moco", "isd"):
        protocols.edit(protocols.record(run, "transfer"), lambda tree: target(tree)["manifest"].update(dataset=name))
    protocols.report()
    tables = protocols.folder / TABLES
    page, latex, plain = ((tables / file).read_text("utf-8") for file in ("index.html", "table.tex", "table.md"))
    assert "<script>alert" not in page + plain
    assert "&lt;script&gt;alert" in page
    assert "\\input{x}" not in latex
    assert "\\textbackslash" in latex
    assert ",=1+1" not in (tables / "cells.csv").read_text("utf-8")
    assert not protocols.verify("--quick").tree["ok"]


# --- the lock, and runs that were taken away ------------------------------------------------------------------------


def test_a_run_that_was_deleted(clean: Profile) -> None:
    """The page shows `not run`, as it would before the run."""
    write_lock(clean)
    shutil.rmtree(clean.record("moco", "knn").parent)
    clean.report()
    answer = clean.verify()
    for part in ("pretrain", "knn"):
        assert "as dvc.lock says" in answer.caught(f"{RECORDS}/moco/{part}.json", "file", "restore the record")["expected"]
    assert len(answer.failures) == 2


def test_a_run_renamed_with_all_that_names_it(clean: Profile) -> None:
    write_lock(clean)
    for part in ("pretrain", "knn", "linear"):
        clean.edit(clean.record("isd", part), lambda tree: tree.update(run="better"))
    folder = clean.record("isd", "knn").parent
    folder.rename(folder.parent / "better")
    clean.replace(clean.folder / "params.yaml", "linear_runs: [isd]", "linear_runs: [better]")
    clean.replace(clean.folder / "params.yaml", "  isd:\n", "  better:\n")
    clean.report()
    answer = clean.verify()
    assert {(f"{RECORDS}/isd/{part}.json", "file") for part in ("pretrain", "knn", "linear")} <= set(answer.failures)


def test_records_beside_the_lock(clean: Profile) -> None:
    lock = write_lock(clean)
    whole = lock.read_text("utf-8")
    lock.write_text(whole[: whole.index("  knn@moco")] + whole[whole.index("  pretrain@moco") :], encoding="utf-8")
    shutil.copytree(clean.record("moco", "knn").parent, clean.record("moco", "knn").parent.parent / "spare")
    clean.report()
    answer = clean.verify("--quick")
    assert answer.failures == [("dvc.lock", f"{RECORDS}/moco/knn.json")]
    assert answer.tree["notes"][0] == "records of spare, which is not a run in params.yaml, are not in any table"


# --- parameters -----------------------------------------------------------------------------------------------------

CHANGED = [  # the old text and the new, the key, and both values
    ("label: ISD", "label: ISD (ours)", "runs.isd.label", "ISD (ours)", "ISD"),
    ("tau_student: 0.1", "tau_student: 0.2", "runs.isd.method.tau_student", "0.2", "0.1"),
    ("label: MoCo v2", "label: ISD", "runs.moco.label", "ISD", "MoCo v2"),
    ("k: [1, 5]", "k: [1, 3]", "evaluation.knn.k", "[1, 3]", "[1, 5]"),
    ("epochs: 3, batch", "epochs: 4, batch", "evaluation.linear.epochs", "4", "3"),
    ("rare_images: 5, seed: 0", "rare_images: 5, seed: 1", "subsets.digits.rule.seed", "1", "0"),
    ("search_per_class: 4", "search_per_class: 5", "subsets.digits.search_per_class", "5", "4"),
    ("dataset: MNIST", "dataset: ImageNet", "subsets.digits.source.dataset", "ImageNet", "MNIST"),
]


def test_changed_parameters(clean: Profile) -> None:
    """A page of the changed parameters agrees with them, and the records still do not."""
    for old, new, *_ in CHANGED:
        clean.replace(clean.folder / "params.yaml", old, new)
    clean.report()
    answer = clean.verify()
    for _, _, key, found, expected in CHANGED:
        one = answer.caught("params.yaml", key, "dvc repro")
        assert (one["found"], one["expected"]) == (found, f"{expected}, as the record says")


def test_a_note_may_be_added_later(clean: Profile) -> None:
    clean.replace(clean.folder / "params.yaml", "notes: [DEV-01, DEV-07]", "notes: [DEV-01, DEV-04, DEV-07]")
    answer = clean.verify()
    assert answer.code == 4
    assert {file.split("/")[-1] for file, _ in answer.failures} >= {"table.md", "index.html"}
    assert all("the parameters have changed since it was rendered" in one["do"] for one in answer.tree["failures"][:2])
    clean.report()
    assert clean.verify().code == 0


# --- files of a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "stage"), [("encoder", "pretrain"), ("features", "extract")])
def test_another_runs_file_under_the_same_name(profile: Profile, file: str, stage: str) -> None:
    path = profile.folder / f"runs/isd/{file}.safetensors"
    then = sha256_file(path)
    shutil.copy(profile.folder / f"runs/moco/{file}.safetensors", path)
    answer = profile.verify()
    one = answer.caught(f"runs/isd/{file}.safetensors", "sha256 of the file", f"`{stage}`")
    assert one["found"] == sha256_file(path)
    assert one["expected"].startswith(f"{then}, as isd/")
    assert answer.verdicts(run="isd") == {"failed"}
    assert answer.verdicts(run="moco", kind="score") == {"re-evaluated"}


def test_another_checkpoint_with_records_made_to_fit(profile: Profile) -> None:
    """Weights changed and every hash of the file rewritten: the predictions are not the encoder's."""
    path = profile.folder / "runs/isd/encoder.safetensors"
    tensors, identity = load_tensors(path, "encoder")
    identity = {key: value for key, value in identity.items() if key not in ("format", "kind")}
    generator = torch.Generator().manual_seed(0)
    changed = {
        key: torch.randn(value.shape, generator=generator) if key.endswith("conv1.weight") else value
        for key, value in tensors.items()
    }
    save_tensors(path, "encoder", changed, identity)
    for part in ("pretrain", "knn", "linear"):
        profile.edit(profile.record("isd", part), lambda tree: tree.update(encoder_sha256=sha256_file(path)))
    (profile.folder / "runs/isd/features.safetensors").unlink()
    profile.report()
    answer = profile.verify()
    assert answer.code == 4
    keys = {key for _, key in answer.failures}
    assert all(re.fullmatch(r"predictions\['(student|teacher)/[15]-NN'\]\[\d+\]", key) for key in keys), keys
    assert answer.verdicts(run="isd", encoder="student", metric="1-NN") == {"failed"}


def test_another_manifest(profile: Profile, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    text = world.PARAMS.replace("rare_images: 5, seed: 0", "rare_images: 5, seed: 7")
    (other / "params.yaml").write_text(text, encoding="utf-8")
    params, layout = config.load(other / "params.yaml")
    prepare("digits", params, layout, Console(quiet=True))
    here = profile.folder / "data/prepared/digits"
    then = json.loads((here / "manifest.json").read_text("utf-8"))["identity"]["sha256"]
    shutil.rmtree(here)
    shutil.copytree(layout.prepared("digits"), here)
    answer = profile.verify()
    said = {(one["key"], one["expected"]) for one in answer.tree["failures"] if one["file"].endswith("digits/manifest.json")}
    runs = ("untrained", "moco", "isd")
    assert said == {("identity.sha256", f"{then}, as {run}/pretrain.json says") for run in runs}
    assert answer.verdicts() == {"failed"}


def test_changed_pixels(profile: Profile) -> None:
    path = profile.folder / "data/prepared/digits/store.u8"
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    answer = profile.verify()
    assert "store.u8" in answer.caught("data/prepared/digits", "prepared images")["found"]
    assert answer.verdicts() == {"failed"}


# --- rendered files -----------------------------------------------------------------------------------------------------

EDITED = "it was edited after it was rendered"
FILES = ("table.md", "table.tex", "index.html", "cells.csv")


def test_edited_files(clean: Profile) -> None:
    """One number of each changed: the file, the line, and both versions of it."""
    at: dict[str, int] = {}
    for name in (*(f"tables/{file}" for file in FILES), "cards/isd.md", "metrics.json", "plots/scores.csv"):
        path = clean.folder / "reports/tiny" / name
        lines = path.read_text("utf-8").splitlines()
        at[name] = next(at for at, line in enumerate(lines) if re.search(r"\d\d\.\d", line) and "\u00b1" not in line[:10])
        lines[at[name]] = re.sub(r"\d\d\.\d", "99.9", lines[at[name]], count=1)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    answer = clean.verify()
    for name, line in at.items():
        hint = EDITED if "/" in name and "plots" not in name else "or edited"
        one = answer.caught(f"reports/tiny/{name}", f"line {line + 1}", hint)
        assert "99.9" in one["found"]
        assert "99.9" not in one["expected"]
    assert len(answer.failures) == len(at)


def test_edited_numbers_of_the_cells(clean: Profile) -> None:
    """A field of each of five cells."""
    values: dict[str, object] = {"value": 99.9, "correct": 31, "n": 3000, "high": 99.9, "best": True}
    names, path = dict[str, object](), clean.folder / TABLES / "cells.json"
    tree = json.loads(path.read_text("utf-8"))
    scores = [cell for cell in tree["cells"] if cell["kind"] == "score" and cell["runs"] == ["untrained"] and not cell["best"]]
    for cell, (field, value) in zip(scores, values.items(), strict=False):
        cell[field] = value
        names[f"{cell['table']} / {cell['row']} / {cell['span']} / {cell['column']}: {field}"] = value
    path.write_text(json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    answer = clean.verify()
    for name, value in names.items():
        assert answer.caught(f"{TABLES}/cells.json", name, EDITED)["found"] == json.dumps(value)
    assert len(answer.failures) == len(values) == sum(one["verdict"] == "failed" for one in answer.tree["numbers"])


def test_files_that_are_edited_missing_or_rendered_by_nobody(clean: Profile) -> None:
    clean.edit(clean.folder / TABLES / "cells.json", lambda tree: tree["findings"].append("ISD wins."))
    figure = next((clean.folder / TABLES).glob("scores-*.svg"))
    clean.replace(figure, "</svg>", "<!-- better --></svg>")
    (clean.folder / TABLES / "table.tex").unlink()
    (clean.folder / TABLES / "better.md").write_text("| ISD | 99.9 |\n", encoding="utf-8")
    answer = clean.verify()
    assert {file for file, _ in answer.failures} == {
        f"{TABLES}/{name}" for name in ("cells.json", figure.name, "table.tex", "better.md")
    }
    assert answer.caught(f"{TABLES}/table.tex", "file")["found"] == "none"
    assert "no render writes" in answer.caught(f"{TABLES}/better.md", "file")["found"]
    assert answer.verdicts() == {"recomputed"}, "a file beside the numbers changes none of them"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree.update(code="0" * 64), "it was rendered by another version of the code"),
        (lambda tree: tree.update(params="0" * 64), "the parameters have changed since it was rendered"),
        (lambda tree: tree["files"].pop("table.md"), "it was rendered by an older version of the code, or edited"),
    ],
)
def test_the_stamp_says_why_a_file_is_not_as_rendered(clean: Profile, change: Change, words: str) -> None:
    """It explains; whoever rewrites it changes no verdict."""
    path, stamp = clean.folder / TABLES / "table.md", clean.folder / TABLES / "render.json"
    clean.replace(path, "Tiny", "Huge")
    clean.edit(stamp, lambda tree: tree["files"].update({"table.md": hashlib.sha256(path.read_bytes()).hexdigest()}))
    clean.edit(stamp, change)
    answer = clean.verify("--quick")
    assert answer.failures == [(f"{TABLES}/table.md", "line 1")]
    assert answer.tree["failures"][0]["do"].startswith(words)


def test_records_made_anew_since_the_render(clean: Profile) -> None:
    clean.edit(clean.record("isd", "knn"), lambda tree: tree["provenance"].update(seconds=1234.5))
    answer = clean.verify("--quick")
    hints = {one["do"].split(":")[0] for one in answer.tree["failures"] if "cards" not in one["file"]}
    assert hints == {"records have changed since it was rendered (isd/knn)"}


# --- evaluated checkpoints ----------------------------------------------------------------------------------------------


def test_an_evaluated_checkpoint(profile: Profile) -> None:
    """ISD's own encoder as a checkpoint that somebody brought; then no file but the records, and these tampered with."""
    file = f"{RECORDS}/theirs/external.json"
    code, _, err = profile.command(
        *("evaluate", "--ckpt", "runs/isd/encoder.safetensors", "--prepared", "data/prepared/digits"),
        *("--no-cache", "--out", file, "--label", "Theirs", "--k", "1", "--k", "5"),
    )
    assert code == 0, err
    profile.report()
    shutil.rmtree(profile.folder / "runs")
    answer = profile.verify("--quick")
    assert (answer.code, answer.failures) == (0, [])
    assert answer.verdicts(kind="external", run="theirs") == {"recomputed"}
    assert answer.tree["runs"]["theirs"]["recomputed"] == 6
    rounds: list[dict[str, Change]] = [
        {"scores[student 1-NN all]": lambda tree: target(tree)["scores"][0].update(correct=0)},
        {
            "knn.encoder_sha256": lambda tree: tree.update(sha256="0" * 64),
            "name": lambda tree: tree.update(name="ours"),
            "knn.run": lambda tree: target(tree).update(run="isd"),
        },
        {"form": lambda tree: tree.update(surplus=1)},
    ]
    for changes in rounds:
        for change in changes.values():
            profile.edit(profile.folder / file, change)
        answer = profile.verify("--quick")
        for key in changes:
            answer.caught(file, key)
        assert answer.verdicts(row="Theirs (checkpoint theirs)") == ({"failed", "recomputed"} if "scores" in key else {"failed"})
        assert answer.verdicts(run="isd", metric="1-NN") == {"recomputed"}
