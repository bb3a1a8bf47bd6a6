"""What a number is called when nothing is wrong: as much as was done for it, and no more."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest

from isd_repro.config.reader import fingerprint
from tests.verify.world import RECORDS, Profile


def numbers_of(profile: Profile) -> int:
    """Cells with a value, counted in the file."""
    tree = json.loads((profile.folder / "reports/tiny/tables/cells.json").read_text("utf-8"))
    return sum(cell["value"] is not None for cell in tree["cells"])


def test_with_the_encoders_here_every_number_is_evaluated_anew(profile: Profile) -> None:
    answer = profile.verify("--linear")
    assert (answer.code, answer.failures, answer.tree["ok"]) == (0, [], True)
    assert answer.tree["counts"] == {"re-evaluated": numbers_of(profile), "recomputed": 0, "recorded only": 0, "failed": 0}
    assert answer.tree["notes"] == [], "not even a bit of the features differs"
    assert "isd linear: 3 epochs of 40 images, about " in answer.err, "the time is said before it is spent"


def test_linear_heads_are_trained_again_only_on_request(profile: Profile) -> None:
    answer = profile.verify()
    assert answer.code == 0
    assert answer.verdicts(run="isd", metric="linear-last") == {"recomputed"}
    assert answer.verdicts(run="isd", metric="5-NN") == {"re-evaluated"}
    assert answer.tree["notes"] == ["isd: not re-evaluated unless the option is given: Linear (--linear)"]


def test_a_clean_checkout_is_recomputed(clean: Profile) -> None:
    answer = clean.verify()
    assert (answer.code, answer.failures) == (0, [])
    assert answer.tree["counts"]["recomputed"] == numbers_of(clean) == len(answer.tree["numbers"])
    assert (
        "isd: the encoder is not available (runs/isd/encoder.safetensors), so its numbers are not re-evaluated"
        in answer.tree["notes"]
    )


def test_quick_and_an_encoder_without_images_evaluate_nothing(profile: Profile) -> None:
    answer = profile.verify("--quick")
    assert (answer.code, answer.verdicts()) == (0, {"recomputed"})
    (profile.folder / "data/prepared/digits/manifest.json").unlink()
    answer = profile.verify()
    assert (answer.code, answer.verdicts()) == (0, {"recomputed"})
    assert "untrained: the prepared images are not available" in answer.tree["notes"][0]


@pytest.mark.parametrize("with_encoder", [True, False])
def test_a_number_without_predictions_is_recorded_only(profile: Profile, with_encoder: bool) -> None:
    """The encoder does not help: what is stored for each query is what it would have to give again."""
    profile.edit(profile.record("moco", "knn"), lambda tree: tree["predictions"].pop("teacher/5-NN"))
    profile.report()
    if not with_encoder:
        (profile.folder / "runs/moco/encoder.safetensors").unlink()
    answer = profile.verify()
    assert answer.code == 0
    assert answer.verdicts(run="moco", metric="5-NN", encoder="teacher") == {"recorded only"}
    assert answer.verdicts(run="moco", metric="5-NN", encoder="student") == {"re-evaluated" if with_encoder else "recomputed"}


def test_before_the_first_report_the_records_are_verified(profile: Profile) -> None:
    count = numbers_of(profile)
    shutil.rmtree(profile.folder / "reports/tiny/tables")
    answer = profile.verify()
    assert (answer.code, len(answer.tree["numbers"])) == (0, count)
    assert answer.tree["notes"][-1].startswith("no report in reports/tiny/tables yet")


def test_a_run_of_ones_choice(profile: Profile) -> None:
    answer = profile.verify("--run", "moco", "--run", "untrained")
    assert all({"moco", "untrained"} & set(number["runs"]) for number in answer.tree["numbers"])
    assert set(answer.tree["runs"]) == {"moco", "untrained", "differences and means"}
    code, out, err = profile.command("verify", "--run", "mocco")
    assert (code, out) == (3, "")
    assert "no run 'mocco'" in err
    assert "moco" in err


def test_the_summary_for_a_person(profile: Profile) -> None:
    code, out, _ = profile.command("verify")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["run", "re-evaluated", "recomputed", "recorded", "only", "failed"] in lines
    counts = profile.verify().tree
    for run, of in counts["runs"].items():
        shown = [str(of[verdict]) for verdict in ("re-evaluated", "recomputed", "recorded only", "failed") if of[verdict]]
        assert [*run.split(), *shown] in lines
    total = counts["counts"]
    said = f"{total['re-evaluated']} re-evaluated, {total['recomputed']} recomputed; 0 checks failed; "
    assert out.splitlines()[-1].startswith(f"{len(counts['numbers'])} numbers: {said}")


def test_failures_are_printed_before_the_summary(clean: Profile) -> None:
    path = clean.record("isd", "knn")
    clean.edit(path, lambda tree: tree["scores"][0].update(correct=tree["scores"][0]["correct"] + 1))
    code, out, err = clean.command("verify")
    lines = out.splitlines()
    assert code == 4
    assert lines[0] == f"{RECORDS}/isd/knn.json"
    assert [line.split()[0] for line in lines[1:5]] == ["key", "found", "expected", "do"]
    assert "error: 1 check failed" in err


# --- counts ------------------------------------------------------------------------------------------------------------


def test_the_page_says_as_many_numbers_as_verify(clean: Profile) -> None:
    clean.edit(clean.record("moco", "knn"), lambda tree: tree["predictions"].pop("teacher/5-NN"))
    clean.report()
    counts = clean.verify("--quick").tree["counts"]
    tables = clean.folder / "reports/tiny/tables"
    said = re.search(r"(\d+) of (\d+) numbers of this page were recomputed", (tables / "index.html").read_text("utf-8"))
    assert said
    assert counts["recorded only"] > 0
    assert (int(said[1]), int(said[2])) == (counts["recomputed"], counts["recomputed"] + counts["recorded only"])
    footnotes = json.loads((tables / "cells.json").read_text("utf-8"))["footnotes"]
    assert any(note.startswith(f"{counts['recorded only']} numbers are recorded only") for note in footnotes)


def test_seeds_that_have_not_been_run_fail_nothing(clean: Profile) -> None:
    """A mean over two of three seeds; the third run is planned."""
    text = (clean.folder / "params.yaml").read_text("utf-8")
    at = text.index("  isd:\n")
    again = text[at:].replace("label: ISD", "label: ISD, seed {0}")
    more = "".join(
        again.replace("  isd:\n", f"  isd-{seed}:\n").replace("seed {0}", f"seed {seed}") + f"    numerics: {{seed: {seed}}}\n"
        for seed in (1, 2)
    )
    (clean.folder / "params.yaml").write_text(text + more, encoding="utf-8")
    shutil.copytree(clean.record("isd", "knn").parent, clean.record("isd-1", "knn").parent)
    clean.record("isd-1", "linear").unlink()
    for part in ("pretrain", "knn"):
        clean.edit(clean.record("isd-1", part), lambda tree: tree.update(run="isd-1", encoder_sha256="1" * 64))

    def seeded(tree: dict[str, Any]) -> None:
        tree["label"] = "ISD, seed 1"
        tree["config"]["numerics"]["seed"] = 1
        tree["fingerprint"] = fingerprint(tree["config"])

    clean.edit(clean.record("isd-1", "pretrain"), seeded)
    clean.report()
    answer = clean.verify("--quick")
    assert (answer.code, answer.failures) == (0, [])
    means = [one for one in answer.tree["numbers"] if one["kind"] == "mean" and "isd-1" in one["runs"]]
    assert means
    assert not any("isd-2" in one["runs"] for one in means), "a run without a record is behind no mean"
    assert {one["verdict"] for one in means} == {"recomputed"}
    assert answer.tree["counts"]["failed"] == 0
