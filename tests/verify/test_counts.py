"""The page and `verify` count the same numbers, and an unfinished series of seeds has the verdict of the runs that were made."""

from __future__ import annotations

import json
import re
import shutil

from tests.verify.world import Profile


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

    def seeded(tree: dict[str, object]) -> None:
        from isd_repro.config.reader import fingerprint

        tree["label"] = "ISD, seed 1"
        tree["config"]["numerics"]["seed"] = 1  # type: ignore[index]
        tree["fingerprint"] = fingerprint(tree["config"])  # type: ignore[arg-type]

    clean.edit(clean.record("isd-1", "pretrain"), seeded)
    clean.report()
    answer = clean.verify("--quick")
    assert (answer.code, answer.failures) == (0, [])
    means = [one for one in answer.tree["numbers"] if one["kind"] == "mean" and "isd-1" in one["runs"]]
    assert means
    assert not any("isd-2" in one["runs"] for one in means), "a run without a record is behind no mean"
    assert {one["verdict"] for one in means} == {"recomputed"}
    assert answer.tree["counts"]["failed"] == 0
