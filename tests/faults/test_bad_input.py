"""Wrong parameters and wrong data: the exit code, and a message that names what to fix."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from isd_repro.config import params
from isd_repro.data import sources
from isd_repro.nn import products
from tests.data import trees
from tests.faults import chain, world


@dataclass(frozen=True)
class Wrong:
    """One change of a valid file, and what its message says; `line` is text of the line that it has to name."""

    change: tuple[str, str]
    says: tuple[str, ...]
    line: str = ""


WRONG = {
    "a wrong key": Wrong(("lr: 0.05", "lrr: 0.05"), ("runs.isd.optim.lrr: unknown key (did you mean 'lr'?)",), "lrr:"),
    "a wrong key of a rule": Wrong(
        ("{name: balanced, per_class: 8, seed: 0}", "{name: halves, tunning: 1, part: first, large: 1, rare_images: 1}"),
        ("subsets.digits.rule.tunning: unknown key (did you mean 'tuning'?)",),
        "tunning:",
    ),
    "a missing key": Wrong(("    label: ISD\n", ""), ("runs.isd.label: Field required",), "  isd:"),
    "a wrong value": Wrong(
        ("epochs: 3", "epochs: -3"), ("runs.isd.optim.epochs: Input should be greater than or equal to 0 (got -3)",), "epochs:"
    ),
    "a wrong type": Wrong(("epochs: 3", "epochs: many"), ("runs.isd.optim.epochs:", "(got 'many')"), "epochs:"),
    "a wrong choice": Wrong(("{name: cosine}", "{name: linear}"), ("runs.isd.optim.schedule", "'step', 'cosine'"), "schedule:"),
    "an unknown subset": Wrong(
        ("subset: digits", "subset: letters"), ("runs.isd.data.subset: 'letters' is not one of ['digits']",), "subset:"
    ),
    "a wrong method key": Wrong(
        ("tau_student: 0.1", "tau_studnet: 0.1"),
        ("runs.isd.method.tau_studnet: unknown key (did you mean 'tau_student'?)",),
        "tau_studnet:",
    ),
    "a wrong method value": Wrong(
        ("tau_student: 0.1", "tau_student: 0"), ("runs.isd.method.tau_student:", "greater than 0 (got 0)"), "tau_student:"
    ),
    "an unknown method": Wrong(
        ("name: isd", "name: isdd"), ("runs.isd.method.name", "'isdd'", "did you mean 'isd'?"), "name: isdd"
    ),
    "groups that do not divide the batch": Wrong(
        ("bn_groups: 2", "bn_groups: 3"), ("runs.isd.numerics.bn_groups: 3 groups of a batch of 16",), "bn_groups"
    ),
    "groups of one image": Wrong(
        ("bn_groups: 2", "bn_groups: 16"), ("runs.isd.numerics.bn_groups: 16 groups of a batch of 16",), "bn_groups"
    ),
    "a bank that is no multiple": Wrong(
        ("bank_size: 32", "bank_size: 40"), ("bank_size: 40 is not a multiple of optim.batch_size 16", "use 32"), "bank_size:"
    ),
    "a batch larger than the subset": Wrong(
        ("batch_size: 16", "batch_size: 96"), ("optim.batch_size: 96, but subset 'digits' has only 80 images",), "batch_size:"
    ),
    "means that do not fit the channels": Wrong(
        ("mean: [0.13]", "mean: [0.13, 0.2, 0.2]"), ("runs.isd.data", "3 means, 1 deviations, 1 channels"), "    data:"
    ),
    "no YAML": Wrong(("runs:\n", "runs: [\n"), ("not YAML",)),
    "no mapping": Wrong((world.PARAMS, "- a\n- list\n"), ("params.yaml:1: expected a mapping of groups",)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_parameters(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = WRONG[kind]
    changes = [wrong.change]
    if kind == "a batch larger than the subset":
        changes.append(("bank_size: 32", "bank_size: 96"))
    world.edit(folder, *changes)
    code, error = world.command(folder, "pretrain", "isd", capsys=capsys)
    assert code == 3, error
    assert error.startswith("error: "), error
    assert "\nhint: " in error
    assert "Traceback" not in error
    for part in wrong.says:
        assert part in error
    if wrong.line:
        lines = (folder / "params.yaml").read_text("utf-8").splitlines()
        (number,) = [at for at, text in enumerate(lines, start=1) if wrong.line in text]
        assert f"params.yaml:{number}" in error
    assert world.written(folder) == set()


def test_every_problem_is_named_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.edit(folder, ("epochs: 3", "epochs: -3"), ("lr: 0.05", "lrr: 0.05"), ("width: 4", "width: four"))
    code, error = world.command(folder, "pretrain", "isd", capsys=capsys)
    assert code == 3
    assert error.count("params.yaml:") == 3  # that `lr` is missing is the same mistake as `lrr`


def test_parameters_of_another_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The method's keys are checked later than the others, and in the file that was given."""
    world.edit(folder, ("tau_student: 0.1", "tau: 0.1"))
    (folder / "params.yaml").rename(folder / "other.yaml")
    code, error = world.command(folder, "pretrain", "isd", "--params", "other.yaml", capsys=capsys)
    assert (code, "other.yaml:19 runs.isd.method.tau: unknown key" in error) == (3, True), error


def test_an_unknown_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = world.command(folder, "pretrain", "isdd", capsys=capsys)
    assert (code, "no run 'isdd'" in error, "did you mean 'isd'?" in error) == (3, True, True)


def test_no_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = world.command(tmp_path, "pretrain", "isd", capsys=capsys)
    assert (code, "params.yaml: no such file" in error) == (3, True)


def test_bf16_without_cuda(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(products, "multiplies_bf16", lambda: False)
    world.edit(folder, ("precision: float32", "precision: bf16"))
    code, error = world.command(folder, "pretrain", "isd", capsys=capsys)
    assert (code, "runs.isd.numerics.precision: bf16 needs a CUDA device" in error) == (3, True)
    assert world.written(folder) == set()


# --- data ---------------------------------------------------------------------------------------------------------------


def test_a_subset_that_is_not_prepared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "data")
    code, error = world.command(folder, "pretrain", "isd", capsys=capsys)
    assert (code, "data/prepared/digits" in error, "prepare" in error) == (4, True, True)
    assert world.written(folder) == set()


def test_a_stage_says_so_before_it_begins(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same profile, read from a folder: the run is not trained on images that the variable does not name."""
    with sources.open_source(params.Source(name="digits", dataset="MNIST")) as digits:
        for image in [image for image in digits.images if int(image.file.rpartition("_")[2].partition(".")[0]) % 10 == 0]:
            place = tmp_path / "images" / image.split / image.cls / image.file
            place.parent.mkdir(parents=True, exist_ok=True)
            digits.decode(digits.fetch(image)).save(place)
    world.edit(folder, ("{name: digits, dataset: MNIST}", "{name: image-folder, root_env: ISD_TEST_ROOT, dataset: MNIST}"))
    monkeypatch.setenv("ISD_TEST_ROOT", str(tmp_path / "images"))
    assert chain.call(folder, "prepare", "digits").code == 0
    monkeypatch.setenv("ISD_TEST_ROOT", str(trees.write_plain(tmp_path / "other", trees.images({"n07": 3}))))
    chain.refused(chain.call(folder, "pretrain", "isd"), "does not hold the images that subset 'digits' was prepared from")
    monkeypatch.delenv("ISD_TEST_ROOT")
    assert chain.call(folder, "pretrain", "isd").code == 0
