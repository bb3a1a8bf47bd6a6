"""`check` finds what later stages would fail on or make nothing of, one line for each mistake, before anything runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults import chain
from tests.verify.world import PARAMS

ROOT = Path(__file__).parents[2]
HYPOTHESIS = "reference: untrained, hypothesis: {first: ISD, second: MoCo v2, group: rare, k: 1}}"
DRAW = """\
subsets:
  twin:
    source: {name: digits, dataset: MNIST}
    rule: {name: unbalanced, large: 2, rare_images: 5, seed: 0}
    search_per_class: 4
    query_per_class: 3
    store: {channels: 1}
"""
RUN = """\
  twin:
    label: Twin
    backbone: *narrow
    method: {name: moco, tau: 0.2, momentum: 0.9, bank_size: 64, dim: 8}
    optim: *optim
    data: *data
  isd:
"""
WRONG = {  # the change, the message, and text of the line where the mistake stands
    "bank": (
        ("bank_size: 64, bank_init", "bank_size: 65, bank_init"),
        "runs.isd.method.bank_size: 65 is not a multiple",
        "bank_size: 65",
    ),
    "shifted images": (("name: digits", "name: stl10, root_env: X, shift: 2"), "shift: 2, but only the source `digits`", "shift"),
    "large classes": (("large: 2", "classes: 9, large: 30"), "rule.large: 30 large classes of 9 leave no rare one", "large: 30"),
    "more classes than there are": (
        ("large: 2", "classes: 11, large: 2"),
        "rule.classes: 11 classes, but digits has 10",
        "classes: 11",
    ),
    "named large classes": (
        ("large: 2", "large: 2, large_classes: ['1']"),
        "rule.large: 2, but large_classes names 1",
        "large: 2",
    ),
    "copy of a run": (
        ("  isd:\n", RUN),
        "runs.twin: differs in no parameter from 'moco'",
        "  twin:",
    ),
    "copy of a draw": (
        ("subsets:\n", DRAW),
        "subsets.digits: draws the same images as 'twin'",
        "  digits:",
    ),
    "hypothesis without draws": (
        ("reference: untrained}", HYPOTHESIS),
        "report.hypothesis: no repeated draws of ISD and MoCo v2",
        "hypothesis:",
    ),
    "trials chosen by a score that nothing computes": (
        ("reference: untrained}", "reference: untrained, trials: {k: 20}}"),
        "report.trials.k: 20-NN is not computed",
        "trials:",
    ),
    "group that no subset has": (
        ("reference: untrained}", "reference: untrained, trials: {group: few}}"),
        "report.trials.group: 'few', but the subsets have only all, large, rare",
        "trials:",
    ),
    "protocol that is not the paper's": (
        ("protocol: short, ", ""),
        "evaluation.linear.protocol: 'paper' with values that are not the paper's",
        "linear: {epochs: 3",
    ),
    "width that an architecture lacks": (
        ("&narrow {arch: resnet-narrow, width: 4, channels: 1}", "&narrow {arch: resnet18, width: 32, channels: 1}"),
        "runs.untrained.backbone: resnet18 has width 64 and pool 1 (got width 32",
        "    backbone: &narrow",
    ),
    "stem that an architecture lacks": (
        ("&narrow {arch: resnet-narrow, width: 4, channels: 1}", "&narrow {arch: resnet18, stem: strided, channels: 1}"),
        "runs.untrained.backbone: resnet18 has no strided stem",
        "    backbone: &narrow",
    ),
    "run in a list": (
        ("linear_runs: [isd]", "linear_runs: [isd, isdd]"),
        "linear_runs.1: 'isdd' is not one of the runs",
        "linear_runs",
    ),
    "mistyped key of an anchor": (
        ("epochs: 1, batch_size", "epoch: 1, batch_size"),
        "runs.moco.optim.epoch: unknown key (did you mean 'epochs'?)",
        "epoch: 1",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_is_one_line_where_it_stands(tmp_path: Path, kind: str) -> None:
    (old, new), says, line = WRONG[kind]
    assert PARAMS.count(old) == 1
    text = PARAMS.replace(old, new)
    (tmp_path / "params.yaml").write_text(text, "utf-8")
    done = chain.call(tmp_path, "check", "params.yaml")
    chain.refused(done, says, code=3)
    number = next(at for at, one in enumerate(text.splitlines(), start=1) if line in one)
    (said,) = [one for one in done.err.splitlines() if not one.startswith("hint: ")]
    assert said.startswith(f"error: params.yaml:{number} "), (said, number)


def test_groups_by_the_number_of_training_images_can_choose(tmp_path: Path) -> None:
    text = PARAMS.replace("reference: untrained}", "reference: untrained, trials: {group: few}}")
    rule = "    rule: {name: exponential, imbalance: 10}\n    shots: {many_above: 50, few_below: 20}\n"
    (tmp_path / "params.yaml").write_text(re.sub(r"    rule: .*\n", rule, text), "utf-8")
    assert chain.call(tmp_path, "check", ".").out == ".: ok\n"


def test_every_mistake_is_named(tmp_path: Path) -> None:
    text = PARAMS.replace("bank_size: 64", "bank_size: 65").replace("linear: {protocol: short, ", "linear: {")
    (tmp_path / "params.yaml").write_text(text, "utf-8")
    (tmp_path / "other.yaml").write_text(PARAMS.replace("epochs: 1,", "epoch: 1,"), "utf-8")
    (tmp_path / "whole.yaml").write_text(PARAMS, "utf-8")
    done = chain.call(tmp_path, "check", "params.yaml", "other.yaml", "whole.yaml")
    assert (done.code, done.out) == (3, "whole.yaml: ok\n")
    assert done.err.count("params.yaml:") == 3, done.err  # two runs have a bank of their own
    assert "other.yaml:" in done.err


def test_a_copied_profile_does_not_write_into_the_reports_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "pipelines" / "mine"
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(PARAMS.replace("root: .", "root: ../.."), "utf-8")
    chain.refused(
        chain.call(tmp_path, "check", "pipelines/mine"), "mine/params.yaml:1 profile: 'tiny', but the folder is 'mine'", code=3
    )


def test_a_folder_stands_for_its_parameters(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS, "utf-8")
    assert chain.call(tmp_path, "check", ".").out == ".: ok\n"
    assert chain.call(tmp_path, "show", "-p", ".").code == 0


def test_sizes_are_checked_against_the_images(tmp_path: Path) -> None:
    """On request: 8 rare classes of 5 images and 2 large ones of 400; 4 to search and 3 queries a class."""
    (tmp_path / "params.yaml").write_text(PARAMS, "utf-8")
    done = chain.call(tmp_path, "check", "--images", "params.yaml")
    assert "digits: 10 classes, 840 training images, 40 to search, 30 queries" in done.out, done
    text = (
        PARAMS.replace("k: [1, 5]", "k: [1, 41]")
        .replace("batch_size: 32", "batch_size: 1024")
        .replace("bank_size: 64", "bank_size: 1024")
    )
    (tmp_path / "params.yaml").write_text(text, "utf-8")
    assert chain.call(tmp_path, "check", "params.yaml").code == 0
    done = chain.call(tmp_path, "check", "--images", "params.yaml")
    chain.refused(
        done,
        "optim.batch_size: 1024, but 'digits' has 840 training images [also runs.isd",
        "evaluation.knn.k: 41, but the",
        code=3,
    )


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))], ids=lambda path: path.parent.name
)
def test_the_profiles_pass(path: Path) -> None:
    done = chain.call(path.parent, "check", "params.yaml")
    assert (done.code, done.out) == (0, "params.yaml: ok\n"), done.err
