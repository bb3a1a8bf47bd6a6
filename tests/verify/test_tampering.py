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
from tests.verify.world import Answer, Profile

TABLES = "reports/tiny/tables"


def caught(answer: Answer, file: str, key: str, hint: str = "") -> dict[str, Any]:
    """The failure of this file and key: exit code 4, every field filled, and found is not expected."""
    assert answer.code == 4, answer.tree
    found = [one for one in answer.tree["failures"] if (one["file"], one["key"]) == (file, key)]
    assert len(found) == 1, answer.failures
    one = found[0]
    assert one["found"]
    assert one["expected"]
    assert one["found"] != one["expected"]
    assert hint in one["do"]
    assert one["do"]
    assert not answer.tree["ok"]
    return dict(one)


# --- records --------------------------------------------------------------------------------------------------------


def test_a_tampered_metric(clean: Profile) -> None:
    path = clean.record("isd", "knn")
    stated: list[int] = []

    def change(tree: dict[str, Any]) -> None:
        score = next(s for s in tree["scores"] if (s["encoder"], s["metric"], s["group"]) == ("teacher", "5-NN", "rare"))
        stated.append(score["correct"])
        score["correct"] += 2

    clean.edit(path, change)
    answer = clean.verify()
    one = caught(answer, "reports/tiny/records/isd/knn.json", "scores[teacher 5-NN rare]", "restore it from git")
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
    one = caught(answer, "reports/tiny/records/moco/knn.json", f"predictions['teacher/5-NN'][{at[0]}]")
    assert "1 of 30 predictions differ" in one["expected"]
    assert answer.verdicts(run="moco", metric="5-NN") == {"failed"}


def test_tampered_labels(profile: Profile) -> None:
    """Labels and predictions of all runs moved alike, so that every score and every pair of records still agrees."""

    def change(tree: dict[str, Any]) -> None:
        tree["labels"] = pack_labels(unpack_labels(tree["labels"])[ORDER])
        for key, packed in tree["predictions"].items():
            tree["predictions"][key] = pack_labels(unpack_labels(packed)[ORDER])

    for run, part in (("untrained", "knn"), ("moco", "knn"), ("isd", "knn"), ("isd", "linear")):
        profile.edit(profile.record(run, part), change)
    profile.report()
    assert profile.verify("--quick").code == 0
    answer = profile.verify()
    for run in ("untrained", "moco", "isd"):
        one = caught(answer, f"reports/tiny/records/{run}/knn.json", "labels[0]")
        assert (one["found"], one["expected"]) == ("9", "0, as the manifest's images say")
    assert answer.verdicts() == {"failed"}


ORDER = torch.arange(30).flip(0)


def test_a_record_copied_from_another_run(clean: Profile) -> None:
    shutil.copy(clean.record("moco", "knn"), clean.record("isd", "knn"))
    answer = clean.verify()
    assert caught(answer, "reports/tiny/records/isd/knn.json", "run")["found"] == "'moco'"
    caught(answer, "reports/tiny/records/isd/knn.json", "encoder_sha256", "the records come from different runs")
    caught(answer, "reports/tiny/records/isd/linear.json", "features_sha256")
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
    assert caught(answer, "params.yaml", "runs.isd.method.name")["expected"] == "moco, as the record says"
    caught(answer, "reports/tiny/records/isd/pretrain.json", "encoder_sha256", "copy")
    assert caught(answer, "runs/isd/encoder.safetensors", "run")["found"] == "moco"
    assert answer.verdicts(run="isd") == {"failed"}


def test_a_damaged_record(clean: Profile) -> None:
    clean.record("isd", "pretrain").write_text("{}", encoding="utf-8")
    answer = clean.verify()
    assert "fingerprint: Field required" in caught(answer, "reports/tiny/records/isd/pretrain.json", "form")["found"]
    assert answer.verdicts(run="isd") == {"failed"}
    clean.record("isd", "knn").write_text("[", encoding="utf-8")
    answer = clean.verify()
    caught(answer, "reports/tiny/records/isd/knn.json", "form")
    assert answer.verdicts(run="isd", metric="1-NN") == {"failed"}, "numbers that the page still shows"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda tree: tree["config"]["optim"].update(lr=0.5), "fingerprint"),
        (lambda tree: tree["curve"].append(tree["curve"][0]), "curve"),
        (lambda tree: tree["config"].update(manifest="0" * 64), "config.manifest"),
        (lambda tree: tree["manifest"].update(train=1_281_167), "manifest.train"),
    ],
)
def test_what_a_record_says_twice(clean: Profile, change: Callable[[dict[str, Any]], Any], key: str) -> None:
    clean.edit(clean.record("moco", "pretrain"), change)
    answer = clean.verify()
    assert answer.code == 4
    assert any(key in found for _, found in answer.failures), answer.failures
    assert answer.verdicts(run="moco") == {"failed"}


def test_every_fault_is_named_at_once(clean: Profile) -> None:
    clean.edit(clean.record("isd", "knn"), lambda tree: tree["scores"][0].update(correct=0))
    clean.edit(clean.record("moco", "pretrain"), lambda tree: tree.update(fingerprint="0" * 16))
    clean.replace(clean.folder / "params.yaml", "label: Untrained", "label: Trained")
    answer = clean.verify()
    caught(answer, "reports/tiny/records/isd/knn.json", "scores[student 1-NN all]")
    caught(answer, "reports/tiny/records/moco/pretrain.json", "fingerprint")
    caught(answer, "params.yaml", "runs.untrained.label")
    assert len(answer.failures) == 3


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "key", "found", "expected"),
    [
        ("label: ISD", "label: ISD (ours)", "runs.isd.label", "ISD (ours)", "ISD, as the record says"),
        ("tau_student: 0.1", "tau_student: 0.2", "runs.isd.method.tau_student", "0.2", "0.1, as the record says"),
        ("label: MoCo v2", "label: ISD", "runs.moco.label", "ISD", "MoCo v2, as the record says"),
        ("k: [1, 5]", "k: [1, 3]", "evaluation.knn.k", "[1, 3]", "[1, 5], as the record says"),
        ("epochs: 3", "epochs: 4", "evaluation.linear.epochs", "4", "3, as the record says"),
        ("rare_images: 5, seed: 0", "rare_images: 5, seed: 1", "subsets.digits.rule.seed", "1", "0, as the record says"),
        ("search_per_class: 4", "search_per_class: 5", "subsets.digits.search_per_class", "5", "4, as the record says"),
        ("dataset: MNIST", "dataset: ImageNet", "subsets.digits.source.dataset", "ImageNet", "MNIST, as the record says"),
    ],
)  # fmt: skip
def test_changed_parameters(clean: Profile, old: str, new: str, key: str, found: str, expected: str) -> None:
    clean.replace(clean.folder / "params.yaml", old, new)
    clean.report()  # a page of the changed parameters agrees with them, and the records still do not
    answer = clean.verify()
    one = caught(answer, "params.yaml", key, "dvc repro")
    assert one["found"] == found
    assert one["expected"].startswith(expected)


def test_a_note_may_be_added_later(clean: Profile) -> None:
    clean.replace(clean.folder / "params.yaml", "notes: [DEV-01, DEV-07]", "notes: [DEV-01, DEV-04, DEV-07]")
    answer = clean.verify()
    assert answer.code == 4
    assert {file.split("/")[-1] for file, _ in answer.failures} >= {"table.md", "index.html"}
    assert all("the parameters have changed since it was rendered" in one["do"] for one in answer.tree["failures"][:2])
    clean.report()
    assert clean.verify().code == 0


# --- files of a run -----------------------------------------------------------------------------------------------------


def test_another_checkpoint_under_the_same_name(profile: Profile) -> None:
    path = profile.folder / "runs/isd/encoder.safetensors"
    then = sha256_file(path)
    shutil.copy(profile.folder / "runs/moco/encoder.safetensors", path)
    answer = profile.verify()
    one = caught(answer, "runs/isd/encoder.safetensors", "sha256 of the file", "dvc checkout")
    assert (one["found"], one["expected"]) == (sha256_file(path), f"{then}, as isd/pretrain.json says")
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
    assert all(re.fullmatch(r"predictions\['(student|teacher)/[15]-NN'\]\[\d+\]", key) for _, key in answer.failures), (
        answer.failures
    )
    assert answer.verdicts(run="isd", encoder="student", metric="1-NN") == {"failed"}


def test_features_of_another_encoder(profile: Profile) -> None:
    shutil.copy(profile.folder / "runs/moco/features.safetensors", profile.folder / "runs/isd/features.safetensors")
    answer = profile.verify()
    one = caught(answer, "runs/isd/features.safetensors", "identity", "`extract`")
    assert sha256_file(profile.folder / "runs/moco/encoder.safetensors")[:12] in one["found"]
    assert answer.verdicts(run="isd") == {"failed"}


def test_features_with_other_numbers(profile: Profile) -> None:
    path = profile.folder / "runs/isd/features.safetensors"
    tensors, identity = load_tensors(path, "features")
    identity = {key: value for key, value in identity.items() if key not in ("format", "kind")}
    save_tensors(path, "features", {**tensors, "student.query": tensors["student.query"] + 1}, identity)
    answer = profile.verify()
    caught(answer, "runs/isd/features.safetensors", "sha256 of the file", "`extract`")
    assert any(note.startswith("isd: features computed here differ by 1 at most") for note in answer.tree["notes"])


def test_another_manifest(profile: Profile, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "params.yaml").write_text(
        world.PARAMS.replace("rare_images: 5, seed: 0", "rare_images: 5, seed: 7"), encoding="utf-8"
    )
    params, layout = config.load(other / "params.yaml")
    prepare("digits", params, layout, Console(quiet=True))
    here = profile.folder / "data/prepared/digits"
    then = json.loads((here / "manifest.json").read_text("utf-8"))["identity"]["sha256"]
    shutil.rmtree(here)
    shutil.copytree(layout.prepared("digits"), here)
    answer = profile.verify()
    failures = [one for one in answer.tree["failures"] if one["file"] == "data/prepared/digits/manifest.json"]
    assert {one["key"] for one in failures} == {"identity.sha256"}
    assert [one["expected"] for one in failures] == [
        f"{then}, as {run}/pretrain.json says" for run in ("untrained", "moco", "isd")
    ]
    assert answer.code == 4
    assert answer.verdicts() == {"failed"}


def test_changed_pixels(profile: Profile) -> None:
    path = profile.folder / "data/prepared/digits/store.u8"
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    answer = profile.verify()
    assert "store.u8" in caught(answer, "data/prepared/digits", "prepared images")["found"]
    assert answer.verdicts() == {"failed"}


# --- rendered files -----------------------------------------------------------------------------------------------------

EDITED = "it was edited after it was rendered"


@pytest.mark.parametrize(
    "name",
    [
        "tables/table.md",
        "tables/table.tex",
        "tables/index.html",
        "tables/cells.csv",
        "cards/isd.md",
        "metrics.json",
        "plots/scores.csv",
    ],
)
def test_an_edited_file(clean: Profile, name: str) -> None:
    """One number changed: the file, the line, and both versions of it."""
    path = clean.folder / "reports/tiny" / name
    lines = path.read_text("utf-8").splitlines()
    at = next(at for at, line in enumerate(lines) if re.search(r"\d\d\.\d", line) and "\u00b1" not in line[:10])
    lines[at] = re.sub(r"\d\d\.\d", "99.9", lines[at], count=1)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    answer = clean.verify()
    one = caught(answer, f"reports/tiny/{name}", f"line {at + 1}", EDITED if "/" in name and "plots" not in name else "or edited")
    assert "99.9" in one["found"]
    assert "99.9" not in one["expected"]
    assert len(answer.failures) == 1


@pytest.mark.parametrize(("field", "value"), [("value", 99.9), ("correct", 30), ("n", 3000), ("high", 99.9), ("best", True)])
def test_an_edited_number_of_the_cells(clean: Profile, field: str, value: object) -> None:
    def change(tree: dict[str, Any]) -> None:
        key = ("untrained", "student", "5-NN", "large")
        cell = next(c for c in tree["cells"] if (c["runs"][0], c["encoder"], c["metric"], c["group"]) == key)
        assert cell[field] != value
        cell[field] = value

    path = clean.folder / TABLES / "cells.json"
    tree = json.loads(path.read_text("utf-8"))
    change(tree)
    path.write_text(json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    answer = clean.verify()
    name = f"digits-student / Untrained / Large (n = 6) / 5-NN: {field}"
    assert caught(answer, f"{TABLES}/cells.json", name, EDITED)["found"] == json.dumps(value)
    assert answer.verdicts(run="untrained", metric="5-NN", group="large") == {"failed"}
    assert answer.verdicts(run="untrained", metric="5-NN", group="rare") == {"recomputed"}
    assert len(answer.failures) == 1


def test_an_edited_finding_and_an_edited_figure(clean: Profile) -> None:
    clean.edit(clean.folder / TABLES / "cells.json", lambda tree: tree["findings"].append("ISD wins."))
    figure = next((clean.folder / TABLES).glob("scores-*.svg"))
    clean.replace(figure, "</svg>", "<!-- better --></svg>")
    files = {file for file, _ in clean.verify().failures}
    assert files == {f"{TABLES}/cells.json", f"{TABLES}/{figure.name}"}


def test_files_that_are_missing_and_files_that_nobody_renders(clean: Profile) -> None:
    (clean.folder / TABLES / "table.tex").unlink()
    (clean.folder / TABLES / "better.md").write_text("| ISD | 99.9 |\n", encoding="utf-8")
    answer = clean.verify()
    assert caught(answer, f"{TABLES}/table.tex", "file")["found"] == "none"
    assert "no render writes" in caught(answer, f"{TABLES}/better.md", "file")["found"]
    assert answer.verdicts() == {"recomputed"}, "a file beside the numbers changes none of them"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree.update(code="0" * 64), "it was rendered by another version of the code"),
        (lambda tree: tree.update(params="0" * 64), "the parameters have changed since it was rendered"),
        (lambda tree: tree["files"].pop("table.md"), "it was rendered by an older version of the code, or edited"),
    ],
)
def test_the_stamp_says_why_a_file_is_not_as_rendered(
    clean: Profile, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    """It explains; whoever rewrites it changes no verdict."""
    path, stamp = clean.folder / TABLES / "table.md", clean.folder / TABLES / "render.json"
    clean.replace(path, "Tiny", "Huge")
    clean.edit(stamp, lambda tree: tree["files"].update({"table.md": hashlib.sha256(path.read_bytes()).hexdigest()}))
    clean.edit(stamp, change)
    answer = clean.verify()
    assert answer.failures == [(f"{TABLES}/table.md", "line 1")]
    assert answer.tree["failures"][0]["do"].startswith(words)
    clean.report()
    assert clean.verify().code == 0


def test_records_made_anew_since_the_render(clean: Profile) -> None:
    clean.edit(clean.record("isd", "knn"), lambda tree: tree["provenance"].update(seconds=1234.5))
    answer = clean.verify()
    hints = {one["do"].split(":")[0] for one in answer.tree["failures"] if "cards" not in one["file"]}
    assert hints == {"records have changed since it was rendered (isd/knn)"}


# --- evaluated checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture
def external(profile: Profile) -> Profile:
    """ISD's own encoder once more, as a checkpoint that somebody brought; then no file but the records."""
    out = "reports/tiny/records/theirs/external.json"
    code, _, err = profile.command(
        *("evaluate", "--ckpt", "runs/isd/encoder.safetensors", "--prepared", "data/prepared/digits"),
        *("--no-cache", "--out", out, "--label", "Theirs", "--k", "1", "--k", "5"),
    )
    assert code == 0, err
    profile.report()
    shutil.rmtree(profile.folder / "runs")
    return profile


def test_an_evaluated_checkpoint_is_recomputed(external: Profile) -> None:
    answer = external.verify()
    assert (answer.code, answer.failures) == (0, [])
    assert answer.verdicts(kind="external", run="theirs") == {"recomputed"}
    assert answer.tree["runs"]["theirs"]["recomputed"] == 6


def score_of(tree: dict[str, Any]) -> dict[str, Any]:
    score: dict[str, Any] = tree["evaluations"][0]["scores"][0]
    return score


@pytest.mark.parametrize(
    ("change", "key", "failed"),
    [
        (lambda tree: score_of(tree).update(correct=0), "scores[student 1-NN all]", {"failed", "recomputed"}),
        (lambda tree: tree.update(sha256="0" * 64), "knn.encoder_sha256", {"failed"}),
        (lambda tree: tree.update(name="ours"), "name", {"failed"}),
        (lambda tree: tree["evaluations"][0].update(run="isd"), "knn.run", {"failed"}),
        (lambda tree: tree.update(surplus=1), "form", {"failed"}),
    ],
)
def test_a_tampered_external_record(
    external: Profile, change: Callable[[dict[str, Any]], Any], key: str, failed: set[str]
) -> None:
    external.edit(external.folder / "reports/tiny/records/theirs/external.json", change)
    answer = external.verify()
    caught(answer, "reports/tiny/records/theirs/external.json", key)
    assert answer.verdicts(row="Theirs") == failed
    assert answer.verdicts(run="isd", metric="1-NN") == {"recomputed"}
