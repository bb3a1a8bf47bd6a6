"""Parameters and data that are wrong: the exit code, and a message that names what to fix and where it stands."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from isd_repro.config import params
from isd_repro.config.layout import state_root
from isd_repro.data import sources
from isd_repro.nn import products
from isd_repro.runtime.errors import DataError
from tests.data import trees
from tests.faults import chain, world


@dataclass(frozen=True)
class Wrong:
    """One change of a valid file, and what its message says; `line` is text of the line that it has to name."""

    old: str
    new: str
    says: str
    line: str = ""


RULE, SUBSET, OPTIM = "{name: balanced, per_class: 8, seed: 0}", "runs.isd.data.subset", "runs.isd.optim"
WRONG = {
    # keys
    "a wrong key": Wrong("lr: 0.05", "lrr: 0.05", f"{OPTIM}.lrr: unknown key (did you mean 'lr'?)", "lrr:"),
    "a wrong key of a rule": Wrong(
        RULE,
        "{name: halves, tunning: 1, part: first, large: 1, rare_images: 1}",
        "subsets.digits.rule.tunning: unknown key (did you mean 'tuning'?)",
        "tunning:",
    ),
    "a key that is named as its rule": Wrong(RULE, "{name: list, list: D99}", "subsets.digits.rule.list: ", "{name: list"),
    "a missing key": Wrong("    label: ISD\n", "", "runs.isd.label: Field required", "  isd:"),
    "a wrong method key": Wrong(
        "tau_student: 0.1", "tau_studnet: 0.1", "method.tau_studnet: unknown key (did you mean 'tau_student'?)", "tau_studnet:"
    ),
    # values
    "a negative number": Wrong(
        "epochs: 3", "epochs: -3", "epochs: Input should be greater than or equal to 0 (got -3)", "epochs:"
    ),
    "a text for a number": Wrong(
        "epochs: 3", 'epochs: "5"', f"{OPTIM}.epochs: Input should be a valid integer (got '5')", "epochs:"
    ),
    "true for a number": Wrong("epochs: 3", "epochs: true", "valid integer (got True)", "epochs:"),
    "a number for a text": Wrong("label: ISD", "label: 5", "runs.isd.label: Input should be a valid string", "label:"),
    "a date for a text": Wrong("label: ISD", "label: 2001-01-01", "runs.isd.label", "label:"),
    "infinity": Wrong("lr: 0.05", "lr: .inf", f"{OPTIM}.lr: Input should be a finite number", "lr:"),
    "a seed beyond 64 bits": Wrong("seed: 0, bn", "seed: 18446744073709551616, bn", "less than", "bn_groups"),
    "an image beyond any memory": Wrong("image_size: 20", "image_size: 1000000", "less than or equal to 4096", "image_size:"),
    "a wrong choice": Wrong("{name: cosine}", "{name: linear}", f"{OPTIM}.schedule", "schedule:"),
    "an unknown subset": Wrong("subset: digits", "subset: letters", f"{SUBSET}: 'letters' is not one of ['digits']", "subset:"),
    "a wrong method value": Wrong("tau_student: 0.1", "tau_student: 0", "greater than 0 (got 0)", "tau_student:"),
    "an unknown method": Wrong("name: isd", "name: isdd", "did you mean 'isd'?", "name: isdd"),
    "groups of one image": Wrong("bn_groups: 2", "bn_groups: 16", "numerics.bn_groups: 16 groups of a batch of 16", "bn_groups"),
    "a bank that is no multiple": Wrong(
        "bank_size: 32", "bank_size: 40", "40 is not a multiple of optim.batch_size 16", "bank_size:"
    ),
    "means that do not fit the channels": Wrong("mean: [0.13]", "mean: [0.1, 0.2, 0.2]", "3 means, 1 deviations", "    data:"),
    "channels of other images": Wrong("store: {channels: 1}", "store: {channels: 3}", "its subset has 3-channel images"),
    "a k twice": Wrong("tracking:", "evaluation: {knn: {k: [1, 1]}}\ntracking:", "evaluation.knn.k: 1 is listed twice", "knn:"),
    "an absolute root": Wrong("root: .", "root: /tmp", "root: '/tmp' is absolute", "root:"),
    # names and words that a shell or a terminal would obey
    **{
        f"a run named {name}": Wrong("  isd:\n", f'  "{name}":\n', "pattern") for name in ("$(id)", "a b", "..", "a/b", "-rf", "")
    },
    "a null byte": Wrong("label: ISD", 'label: "a\\0b"', "contains invisible characters", "label:"),
    "a terminal's command": Wrong("label: ISD", 'label: "\\e]0;x\\a"', "runs.isd.label", "label:"),
    # files
    "no YAML": Wrong("runs:\n", "runs: [\n", "not YAML"),
    "no mapping": Wrong(world.PARAMS, "- a\n- list\n", "params.yaml:1: expected a mapping of groups"),
    "a key twice": Wrong("epochs: 3", "epochs: 3\n      epochs: 4", "epochs"),
    "two documents": Wrong(world.PARAMS, f"{world.PARAMS}---\n{world.PARAMS}", "params.yaml"),
    "a number of many digits": Wrong("epochs: 3", "epochs: " + "9" * 5000, "cannot be parsed"),
    "a tag that runs code": Wrong("epochs: 3", 'epochs: !!python/object/apply:os.system ["touch it-ran"]', "not YAML"),
    "many wrong keys": Wrong("runs:\n", "".join(f"k{n}: 1\n" for n in range(2_000)) + "runs:\n", "and 1950 more"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_parameters(tmp_path: Path, kind: str) -> None:
    wrong = WRONG[kind]
    assert world.PARAMS.count(wrong.old) == 1
    text = world.PARAMS.replace(wrong.old, wrong.new)
    (tmp_path / "params.yaml").write_text(text, "utf-8")
    result = chain.call(tmp_path, "check", "params.yaml")
    chain.refused(result, "params.yaml", wrong.says, code=3)
    assert len(result.err) < 20_000
    assert all(sign == "\n" or sign.isprintable() for sign in result.err)
    assert not list(tmp_path.rglob("it-ran"))
    if wrong.line:
        (number,) = [at for at, line in enumerate(text.splitlines(), start=1) if wrong.line in line]
        assert f"params.yaml:{number}" in result.err


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(world.PARAMS, "utf-8")
    world.edit(tmp_path, ("epochs: 3", "epochs: -3"), ("lr: 0.05", "lrr: 0.05"), ("width: 4", "width: four"))
    result = chain.call(tmp_path, "check", "params.yaml")
    assert (result.code, result.err.count("params.yaml:")) == (3, 3)  # that `lr` is missing is the same mistake as `lrr`


def test_bytes_that_are_no_text_and_no_file_at_all(tmp_path: Path) -> None:
    chain.refused(chain.call(tmp_path, "check", "params.yaml"), "params.yaml: no such file", code=3)
    (tmp_path / "params.yaml").write_bytes(b"profile: d\xff\n")
    chain.refused(chain.call(tmp_path, "check", "params.yaml"), "not YAML in UTF-8", code=3)


# --- what a stage finds before it begins -----------------------------------------------------------------------------------


def test_parameters_of_another_name(folder: Path) -> None:
    """The method's keys are checked later than the others, and in the file that was given."""
    world.edit(folder, ("tau_student: 0.1", "tau: 0.1"))
    (folder / "params.yaml").rename(folder / "other.yaml")
    result = chain.call(folder, "pretrain", "isd", "--params", "other.yaml")
    chain.refused(result, "other.yaml:19 runs.isd.method.tau: unknown key", code=3)
    assert world.written(folder) == set()


def test_a_run_that_cannot_be_trained_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.refused(chain.call(folder, "pretrain", "isdd"), "no run 'isdd'", "did you mean 'isd'?", code=3)
    world.edit(folder, ("batch_size: 16", "batch_size: 96"), ("bank_size: 32", "bank_size: 96"))
    large = "optim.batch_size: 96, but subset 'digits' has only 80 images"
    chain.refused(chain.call(folder, "pretrain", "isd"), large, code=3)
    world.edit(folder, ("batch_size: 96", "batch_size: 16"), ("precision: float32", "precision: bf16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(products, "multiplies_bf16", lambda: False)
    result = chain.call(folder, "pretrain", "isd")
    chain.refused(result, "runs.isd.numerics.precision: bf16 needs a CUDA device", code=3)
    shutil.rmtree(folder / "data")
    chain.refused(chain.call(folder, "pretrain", "isd"), "data/prepared/digits", "prepare")
    assert world.written(folder) == set()


def test_images_that_the_subset_was_not_prepared_from(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("size", [("bank_size: 32", "bank_size: 2000000000"), ("batch_size: 16", "batch_size: 2000000000")])
def test_sizes_beyond_any_memory(size: tuple[str, str], folder: Path) -> None:
    """What passes every range ends in one message, and not in a traceback of an allocator."""
    world.edit(folder, size)
    result = chain.call(folder, "pretrain", "isd")
    assert (result.code in {1, 3}, "Traceback" in result.err, "error: " in result.err) == (True, False, True), result


def test_an_allocator_error_is_one_line(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch on the CPU, of torch on a GPU, and of Python; any other RuntimeError stays a defect of ours."""

    def failing(error: BaseException) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr("isd_repro.evaluations.stage.run_evaluation", fail)

    for error in (
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("can't start new thread"),
        MemoryError(),
    ):
        failing(error)
        chain.refused(chain.call(done, "knn", "isd"), "error: not enough memory", code=1)
    failing(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        chain.call(done, "knn", "isd")


def test_a_system_error_is_one_line(done: Path) -> None:
    """A file where a folder must be: the path and the reason, exit code 1, no traceback."""
    shutil.rmtree(done / "reports/tiny/tables")
    (done / "reports/tiny/tables").write_text("in the way", "utf-8")
    chain.refused(chain.call(done, "report"), "reports/tiny/tables", code=1)


def test_a_relative_folder_for_the_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC runs a stage in the profile's folder, where it would be another one."""
    monkeypatch.setenv("ISD_STATE_ROOT", "state")
    with pytest.raises(DataError, match="ISD_STATE_ROOT=state is a relative path"):
        state_root()
