"""What a number is called when nothing is wrong: as much as was done for it, and no more."""

from __future__ import annotations

import json

import pytest

from isd_repro.verify import again
from tests.verify import world
from tests.verify.world import Profile


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


def test_quick_never_says_more_than_recomputed(profile: Profile) -> None:
    answer = profile.verify("--quick")
    assert (answer.code, answer.verdicts()) == (0, {"recomputed"})


def test_an_encoder_without_images_evaluates_nothing(profile: Profile) -> None:
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
    for path in (profile.folder / "reports/tiny/tables").iterdir():
        path.unlink()
    (profile.folder / "reports/tiny/tables").rmdir()
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
    assert lines[0] == "reports/tiny/records/isd/knn.json"
    assert [line.split()[0] for line in lines[1:5]] == ["key", "found", "expected", "do"]
    assert "error: 1 check failed" in err


# --- another machine ----------------------------------------------------------------------------------------------------


def elsewhere(profile: Profile, run: str) -> None:
    """A record from another processor, with one prediction that this one does not give."""

    def change(tree: dict[str, object]) -> None:
        world.swap_wrong(tree, "student/1-NN")
        tree["provenance"]["machine"]["cpu"] = "Another processor"  # type: ignore[index]

    profile.edit(profile.record(run, "knn"), change)
    profile.report()


def test_a_few_other_answers_under_another_arithmetic_leave_a_number_recomputed(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(again, "TOLERATED", 1 / 30)
    monkeypatch.setattr(again, "NOISE", 10.0)  # every answer is a near tie
    elsewhere(profile, "isd")
    answer = profile.verify()
    assert answer.code == 0
    assert answer.verdicts(run="isd", metric="1-NN", encoder="student") == {"recomputed"}
    assert answer.verdicts(run="isd", metric="1-NN", encoder="teacher") == {"re-evaluated"}
    assert any("1 of 30 predictions differ in student/1-NN" in note for note in answer.tree["notes"])


def test_more_other_answers_than_rounding_explains_fail(profile: Profile) -> None:
    assert again.TOLERATED < 1 / 30
    elsewhere(profile, "isd")
    answer = profile.verify()
    assert answer.code == 4
    assert answer.verdicts(run="isd", metric="1-NN", encoder="student") == {"failed"}
