"""The command `evaluate`: the pipeline's own numbers for the pipeline's encoders, and errors that say what to do."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from ruamel.yaml import YAML
from torch import nn
from torchvision import models
from typer.testing import CliRunner

from isd_repro import checkpoints, cli, evaluations
from isd_repro.config import reader as config
from isd_repro.config.layout import Layout
from isd_repro.config.params import BackboneConfig, Params
from isd_repro.data.image_folder import open_folder
from isd_repro.data.prepare import prepare
from isd_repro.evaluations import external
from isd_repro.evaluations.external import Request, evaluate_checkpoint, numbers
from isd_repro.evaluations.stage import extract, run_evaluation
from isd_repro.nn.backbones import build
from isd_repro.records import EvaluationRecord, ExternalRecord, read_record, unpack_labels
from isd_repro.report import page, run_records
from isd_repro.runtime.errors import ConfigError, DataError, Preempted, UserError
from isd_repro.runtime.progress import Task
from isd_repro.tensor_files import save_tensors
from isd_repro.train.pretrain import pretrain
from tests.faults import chain

knn = partial(run_evaluation, "knn")
linear = partial(run_evaluation, "linear")

DEMO = Path(__file__).parents[2] / "params.yaml"
RUN = "isd"


@dataclass(frozen=True)
class World:
    """A run of the demo cut to one epoch on a few digits, through the real stages, with the paper's linear protocol."""

    params: Params
    layout: Layout

    def record(self, part: Any) -> EvaluationRecord:
        return read_record(self.layout.record(RUN, part), EvaluationRecord)

    @property
    def ours(self) -> dict[str, Any]:
        return {"ckpt": self.layout.encoder(RUN), "prepared": self.layout.prepared("digits")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("pipeline")
    tree = YAML(typ="safe").load(DEMO.read_text("utf-8"))
    run = tree["runs"][RUN]
    run["backbone"]["width"] = 4
    run["method"]["bank_size"] = 64
    run["optim"] = {**run["optim"], "epochs": 1, "batch_size": 32}
    subset = tree["subsets"]["digits"]
    subset["rule"] = {"name": "unbalanced", "large": 2, "rare_images": 5, "seed": 0}
    subset["search_per_class"], subset["query_per_class"] = 4, 10
    tree["report"].pop("reference")
    tree["report"].pop("pixels")
    tree |= {"runs": {RUN: run}, "linear_runs": [RUN], "evaluation": {}, "tracking": {"wandb": "off"}}
    yaml = YAML()
    yaml.representer.ignore_aliases = lambda _: True
    with (root / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(tree, file)
    params, layout = config.load(root / "params.yaml")
    console = Console(file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISD_STATE_ROOT", str(root))
        prepare("digits", params, layout, console)
        for stage in (pretrain, extract, knn, linear):
            stage(RUN, params, layout, console)
    return World(params, layout)


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISD_STATE_ROOT", str(tmp_path / "state"))


def ask(request: Request, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What is said on standard output and on the console."""
    said = io.StringIO()
    evaluate_checkpoint(request, Console(file=said, width=40))
    return capsys.readouterr().out, said.getvalue()


def test_an_encoder_of_a_run_gets_the_runs_own_numbers_and_predictions(
    made: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again" / "external.json"
    printed, said = ask(Request(**made.ours, protocol="all", which="both", out=out), capsys)
    again = read_record(out, ExternalRecord)
    for part in again.evaluations:
        recorded = made.record(part.kind)
        assert part.manifest == recorded.manifest
        assert part.encoder_sha256 == recorded.encoder_sha256
        assert part.protocol == recorded.protocol
        assert part.labels == recorded.labels
        assert recorded.predictions.items() <= part.predictions.items()
        theirs = {(score.encoder, score.metric, score.group): score.correct for score in recorded.scores}
        ours = {(score.encoder, score.metric, score.group): score.correct for score in part.scores}
        assert theirs.items() <= ours.items()
    assert [part.kind for part in again.evaluations] == ["knn", "linear"]
    assert again.evaluations[1].settings["best_epoch"] == made.record("linear").settings["best_epoch"]
    metrics = {score.metric for part in again.evaluations for score in part.scores}
    best = ("linear-best", "linear-last", "linear-clean")
    assert metrics == {"1-NN", "20-NN", *best, *(f"{metric}-top5" for metric in best)}
    one, five = (
        {
            s.metric.removesuffix("-top5"): s.correct
            for s in again.evaluations[1].scores
            if s.group == "all" and s.encoder == "student" and s.metric.endswith("-top5") == top
        }
        for top in (False, True)
    )
    assert all(five[metric] > one[metric] for metric in best)
    assert "linear, best epoch" in printed
    assert "Linear: paper. The best linear epoch is chosen on the queries that it is scored on, so it is optimistic." in printed
    assert all(group in printed for group in ("all (n=100)", "rare (n=80)", "large (n=20)"))
    assert "\x1b" not in printed + said
    assert "linear: 40 epochs of 40 images, about" in said


def test_student_and_teacher_are_told_apart_and_features_are_reused(made: World, capsys: pytest.CaptureFixture[str]) -> None:
    _, first = ask(Request(**made.ours), capsys)
    printed, said = ask(Request(**made.ours, which="teacher", as_json=True), capsys)
    assert "were there from before" not in first + said
    found = json.loads(printed)
    recorded = {(s.encoder, s.metric, s.group): s.correct for s in made.record("knn").scores if s.encoder == "teacher"}
    assert {(s["encoder"], s["metric"], s["group"]): s["correct"] for s in found["scores"]} == recorded
    again, said = ask(Request(**made.ours, which="both", as_json=True), capsys)
    assert "features of 140 of 140 images were there from before" in said
    assert len(json.loads(again)["scores"]) == 2 * len(recorded)
    _, said = ask(Request(**made.ours, cache=False), capsys)
    assert "were there from before" not in said
    _, said = ask(Request(**made.ours, image_size=20), capsys)
    assert "were there from before" not in said


def test_classes_one_by_one_add_up(made: World, capsys: pytest.CaptureFixture[str]) -> None:
    printed, _ = ask(Request(**made.ours, per_class=True, as_json=True), capsys)
    found = json.loads(printed)
    assert [row["class"] for row in found["per_class"]] == [str(digit) for digit in range(10)]
    total = {score["metric"]: score["correct"] for score in found["scores"] if score["group"] == "all"}
    for metric, correct in total.items():
        assert sum(row[f"student/{metric}"] * row["n"] / 100 for row in found["per_class"]) == pytest.approx(correct)
    printed, _ = ask(Request(**made.ours, per_class=True), capsys)
    assert "By class, top-1 in percent" in printed


def test_a_report_takes_the_record_in(made: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = Layout(folder=made.layout.folder, root=tmp_path, profile=made.layout.profile)
    shutil.copytree(made.layout.records, layout.records)
    out = layout.records / "theirs" / "external.json"
    ask(Request(**made.ours, label="Theirs", out=out), capsys)
    report = page.assemble(made.params, run_records.load(made.params, layout), layout)
    rows = {row.label: row for row in report.tables[0].rows}
    ours, theirs = rows[made.params.runs[RUN].label], rows["Theirs (checkpoint theirs)"]
    paired = list(zip(ours.cells, theirs.cells, strict=True))
    assert [two.value for one, two in paired if one.part == "knn"] == [one.value for one, _ in paired if one.part == "knn"]
    assert {two.number for one, two in paired if one.part == "linear"} == {"not run"}
    assert not any(cell.best or cell.runs for cell in theirs.cells)
    (note,) = [note for note in report.footnotes if note.startswith("Theirs")]
    assert "encoder.safetensors, sha256" in note
    assert "Made by isd-repro evaluate --ckpt encoder.safetensors --prepared digits." in note
    assert "Theirs" in page.render(report)["index.html"].decode()

    tree = json.loads(out.read_text())
    tree["evaluations"][0]["scores"][0]["correct"] -= 1
    out.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="from its predictions"):
        run_records.load(made.params, layout)
    tree["evaluations"][0]["scores"][0]["correct"] += 1
    tree["sha256"] = "0" * 64
    out.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"knn\.encoder_sha256 is"):
        run_records.load(made.params, layout)
    tree["sha256"] = tree["evaluations"][0]["encoder_sha256"]
    tree["evaluations"][0]["manifest"]["sha256"] = "1" * 64
    out.write_text(json.dumps(tree))
    report = page.assemble(made.params, run_records.load(made.params, layout), layout)
    assert "Theirs (checkpoint theirs)" not in {row.label for row in report.tables[0].rows}
    assert any("no table here uses the same images" in note for note in report.footnotes)


def test_the_row_of_a_checkpoint_with_the_label_of_a_run_is_told_apart(
    made: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = Layout(folder=made.layout.folder, root=tmp_path, profile=made.layout.profile)
    shutil.copytree(made.layout.records, layout.records)
    label = made.params.runs[RUN].label
    ask(Request(**made.ours, label=label, out=layout.records / "a" / "external.json"), capsys)
    rows = page.assemble(made.params, run_records.load(made.params, layout), layout).tables[0].rows
    assert [row.label for row in rows] == [label, f"{label} (checkpoint a)"]


# --- other people's checkpoints on plain folders ------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of different brightness, 12 train and 4 val images each, some grey."""
    root = tmp_path / "pictures"
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for cls, level in (("dark", 40), ("grey", 120), ("light", 210)):
            folder = root / split / cls
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = (level + draw.normal(0, 15, (20, 24, 3))).clip(0, 255).astype(np.uint8)
                image = Image.fromarray(pixels)
                (image.convert("L") if number % 4 == 0 else image).save(folder / f"{number}.png")
    return root


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = models.resnet18().state_dict()
    path = tmp_path / "R18.pth"
    torch.save(state, path)
    return path


def test_a_foreign_checkpoint_on_a_folder(foreign: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = Request(foreign, data=pictures, image_size=32, as_json=True, options={"--k": (1, 5)})
    first = json.loads(ask(request, capsys)[0])
    said = ask(Request(**{**vars(request), "cache": False, "workers": 1}), capsys)
    again = json.loads(said[0])
    assert first["scores"] == again["scores"]
    assert (first["name"], first["arch"], first["images"]["query"]) == ("r18", "resnet18", 12)
    assert first["transform"]["mean"] == [0.485, 0.456, 0.406]
    assert "48 of 48 images have a short side below 37 and are enlarged to it" in said[1]
    net = models.resnet18()
    net.load_state_dict(torch.load(foreign, weights_only=True))
    net.fc = nn.Identity()
    rows, labels = {}, {}
    from isd_repro.data import augment

    for split in ("train", "val"):
        files = sorted((pictures / split).rglob("*.png"), key=lambda path: (path.parent.name, path.name))
        pixels = torch.stack(
            [torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1) for path in files]
        )
        views = augment.centre(pixels, torch.tensor([[20, 24]] * len(files)), 32, 0.875)
        views = augment.normalise(views, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.inference_mode():
            rows[split] = nn.functional.normalize(net.eval()(views).double(), dim=1)
        labels[split] = torch.tensor([("dark", "grey", "light").index(path.parent.name) for path in files])
    nearest = labels["train"][(rows["val"] @ rows["train"].T).argmax(dim=1)]
    correct = {score["metric"]: score["correct"] for score in first["scores"]}
    assert correct["1-NN"] == int((nearest == labels["val"]).sum())
    assert correct["1-NN"] > 4  # of 12; a random network tells brightness


def test_every_evaluation_that_needs_no_run_can_be_asked_for(
    foreign: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"few_label", "knn", "knn_dense", "linear", "weighted_knn"} <= set(evaluations.of_any_checkpoint())
    assert {"trajectory", "transfer"}.isdisjoint(evaluations.of_any_checkpoint())
    request = Request(foreign, data=pictures, image_size=32, protocol="weighted_knn", options={"--k": (3, 5)}, per_class=True)
    out, _ = ask(request, capsys)
    assert "5-NN, weighted" in out
    assert "Weighted nearest neighbours: 3-NN, 5-NN weighted by" in out
    assert "By class, top-1 in percent" in out


def test_the_table_says_what_the_numbers_are(foreign: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protocols and chance below the table, and Wilson's interval beside each number."""
    options = {"--linear-epochs": 2}
    out, _ = ask(Request(foreign, data=pictures, image_size=32, protocol="linear", options=options, cache=False), capsys)
    assert "Linear: paper's, with 2 epochs for 40." in out
    assert "Chance is 33.33 % top-1 (3 classes)." in out
    out, _ = ask(Request(foreign, data=pictures, image_size=32, cache=False), capsys)
    assert "epochs" not in out
    found = re.search(r"1-NN +(\d+\.\d\d) \[(\d+\.\d), (\d+\.\d)\]", out)
    assert found is not None
    share, low, high = (float(each) / 100 for each in found.groups())
    z, n = 1.959964, 12
    middle, half = (
        (share + z**2 / (2 * n)) / (1 + z**2 / n),
        z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n),
    )
    assert low == pytest.approx(middle - half, abs=1e-3)
    assert high == pytest.approx(middle + half, abs=1e-3)


def test_an_encoder_for_small_images_gets_a_hint(foreign: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(foreign, weights_only=True)
    torch.save(state | {"conv1.weight": state["conv1.weight"][:, :, 2:5, 2:5].contiguous()}, foreign)
    hint = "has a stem for small images"
    assert hint not in ask(Request(foreign, data=pictures, image_size=32, cache=False), capsys)[1]
    checkpoint = checkpoints.load(foreign)
    for size, told in ((None, True), (32, False)):
        request = Request(foreign, data=pictures, image_size=size)
        with open_folder(pictures, 3) as opened:
            notes = list(external._about(request, checkpoint, opened, external.frame_of(request, checkpoint)))
        assert any(hint in note for note in notes) == told


def test_a_grey_encoder_reads_colour_as_grey(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = BackboneConfig(arch="resnet-narrow", width=2, channels=1)
    net = build(config, 16)
    identity = {
        "backbone": config.model_dump(mode="json"),
        "image_size": 16,
        "crop_ratio": 1.0,
        "mean": [0.4],
        "std": [0.2],
        "encoders": ["student"],
    }
    identity |= {"profile": "p", "run": "r", "fingerprint": "f", "manifest": "m"}
    path = tmp_path / "encoder.safetensors"
    save_tensors(path, "encoder", {f"student.{key}": value for key, value in net.state_dict().items()}, identity)
    colour = json.loads(ask(Request(path, data=pictures, as_json=True), capsys)[0])
    grey = tmp_path / "grey"
    for file in pictures.rglob("*.png"):
        target = grey / file.relative_to(pictures)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).convert("L").save(target)
    assert json.loads(ask(Request(path, data=grey, as_json=True), capsys)[0])["scores"] == colour["scores"]
    assert colour["transform"]["channels"] == 1
    with pytest.raises(ConfigError, match="--mean has 3 values, the encoder sees 1 channels"):
        ask(Request(path, data=pictures, mean=(0.1, 0.2, 0.3)), capsys)


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"data": None}, ConfigError, "either --data or --prepared"),
        ({"prepared": Path("x")}, ConfigError, "either --data or --prepared"),
        ({"data": None, "prepared": Path("none")}, DataError, "manifest.json: no such file"),
        ({"data": Path("none")}, DataError, "no such folder or zip"),
        ({"ckpt": Path("none.pth")}, DataError, "no such file"),
        ({"options": {"--k": (1, 37)}}, ConfigError, "k = 37: the search set has 36 images"),
        ({"options": {"--k": (0,)}}, ConfigError, "--k .0,.: Input should be greater than or equal to 1"),
        ({"protocol": "trajectory"}, ConfigError, "--protocol trajectory: no such evaluation"),
        ({"image_size": 0}, ConfigError, "--image-size 0: Input should be greater"),
        ({"crop_ratio": 1.5}, ConfigError, "--crop-ratio 1.5"),
        ({"std": (0.0, 1.0, 1.0)}, ConfigError, "--std"),
        ({"data": None, "prepared": Path("x"), "listed": Path("D1.txt")}, ConfigError, "--list has no effect with --prepared"),
        ({"out": Path("Bad Name/external.json")}, ConfigError, "is not a valid record name"),
        ({"image_size": 7}, ConfigError, "--image-size 7: Input should be greater than or equal to 8"),
        ({"image_size": 4097}, ConfigError, "--image-size 4097: Input should be less than or equal to 4096"),
        ({"crop_ratio": 0.003}, ConfigError, "--image-size 16 with --crop-ratio 0.003: a short side above 4096"),
        ({"crop_ratio": 1e-320}, ConfigError, "a short side above 4096"),
        ({"crop_ratio": math.nan}, ConfigError, "--crop-ratio nan"),
        ({"mean": (math.nan, 1.0, 1.0)}, ConfigError, "--mean nan: Input should be a finite number"),
        ({"std": (math.inf, 1.0, 1.0)}, ConfigError, "--std inf: Input should be a finite number"),
        ({"workers": -1}, ConfigError, "--workers -1"),
        ({"data": None, "prepared": Path("x"), "workers": 2}, ConfigError, "--workers has no effect with --prepared"),
        ({"options": {"--k": (5, 1, 5)}}, ConfigError, "--k .5, 1, 5.: .* twice"),
        ({"protocol": "linear", "options": {"--k": (5,)}}, ConfigError, "--k has no effect with --protocol linear"),
        ({"options": {"--linear-seeds": 2}}, ConfigError, "--linear-seeds has no effect with --protocol knn"),
        ({"protocol": "linear", "options": {"--linear-epochs": 0}}, ConfigError, "--linear-epochs 0: Input should be greater"),
        ({"label": " "}, ConfigError, "--label ' ': String should match"),
        ({"label": "a\nb"}, ConfigError, "--label .*: String should match"),
    ],
    ids=str,
)
def test_wrong_requests_say_what_is_wrong(
    foreign: Path, pictures: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], kind: type[UserError], match: str
) -> None:
    request = Request(**{"ckpt": foreign, "data": pictures, "image_size": 16, **change})
    with pytest.raises(kind, match=match) as caught:
        ask(request, capsys)
    assert caught.value.hint


def test_a_place_that_cannot_take_the_record_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    checkpoint = tmp_path / "x.pth"
    checkpoint.write_text("text")
    said = {
        tmp_path / "pipe": "is not a file",
        tmp_path / "folder": "is not a file",
        tmp_path / "file" / "x.json": "Not a directory|File exists",
        tmp_path / ("x" * 300): "File name too long",
        checkpoint: "is the file that is being read",
        tmp_path / "Bad Name" / "external.json": "is not a valid record name",
    }
    for out, words in said.items():
        with pytest.raises(ConfigError, match=words) as caught:
            evaluate_checkpoint(Request(checkpoint, data=tmp_path / "none", out=out), Console(file=io.StringIO()))
        assert caught.value.hint


def test_a_collapse_is_said_and_recorded(
    foreign: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "student: features of all images are the same (collapsed), so its numbers are those of chance"
    request = Request(foreign, data=pictures, image_size=16, out=tmp_path / "x.json", as_json=True)
    printed, said = ask(request, capsys)
    assert words not in said
    assert read_record(tmp_path / "x.json", ExternalRecord).warnings == ()
    state = torch.load(foreign, weights_only=True)
    state["bn1.weight"].zero_()
    state["bn1.bias"].fill_(0.3)
    torch.save(state, foreign)
    printed, said = ask(request, capsys)
    assert words in said.splitlines()
    assert words in json.loads(printed)["notes"]
    assert read_record(tmp_path / "x.json", ExternalRecord).warnings == (words,)


def test_the_expected_time_comes_before_the_long_work(foreign: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    before = []

    def stop(*_: Any, **__: Any) -> None:
        before.append(said.getvalue())
        raise UserError("long work begins")

    monkeypatch.setattr("isd_repro.evaluations.feature_cache.stream", stop)
    request = Request(foreign, data=pictures, image_size=16, protocol="all", options={"--linear-epochs": 3})
    with pytest.raises(UserError, match="long work begins"):
        evaluate_checkpoint(request, Console(file=said))
    assert "linear: 3 epochs of 36 images, about" in before[0]


def test_progress_moves_with_every_image_of_a_group(foreign: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image's view is half of its work: 32 large images are decoded and resized before the first of them passes forward."""
    Image.new("RGB", (40, 30)).save(pictures / "train" / "dark" / "0.png")
    steps: list[float] = []
    monkeypatch.setattr(Task, "advance", lambda self, count=1: steps.append(count) if "features" in self._title else None)
    evaluate_checkpoint(Request(foreign, data=pictures, image_size=32, cache=False), Console(file=io.StringIO()))
    assert sum(steps) == 48
    assert steps[:33] == [0.5] * 32 + [16]


def test_an_interrupt_says_that_the_same_command_goes_on(foreign: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for name in ("isd_repro.data.image_folder._identify", "isd_repro.evaluations.feature_cache.stream"):
        with monkeypatch.context() as patch:
            patch.setattr(name, interrupted)
            with pytest.raises(Preempted) as caught:
                evaluate_checkpoint(Request(foreign, data=pictures, image_size=16), Console(file=io.StringIO()))
        assert "same command" in caught.value.hint


def test_features_that_are_not_finite_are_named(foreign: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(foreign, weights_only=True)
    scaled = (({"conv2": 1e36, "bn2": 1e36}, "are not finite"), ({"bn2": 1e25}, "are too long for float32"))
    for factors, words in scaled:
        broken = {f"layer4.1.{key}.weight": state[f"layer4.1.{key}.weight"] * factor for key, factor in factors.items()}
        torch.save(state | broken, foreign)
        with pytest.raises(DataError, match=f"'student': .* rows {words}") as caught:
            ask(Request(foreign, data=pictures, image_size=16), capsys)
        assert "weights are out of range" in caught.value.hint


def test_the_command_line(foreign: Path, pictures: Path, tmp_path: Path) -> None:
    run: Callable[..., Any] = CliRunner().invoke
    words = ["evaluate", "--ckpt", str(foreign), "--data", str(pictures), "--image-size", "16", "--k", "3", "--json"]
    done = run(cli.app, [*words, "--std", "0.2,0.2,0.2", "--out", str(tmp_path / "x.json")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {score["metric"] for score in found["scores"]} == {"3-NN"}
    record = read_record(tmp_path / "x.json", ExternalRecord)
    assert record.command.endswith("--image-size 16 --std 0.2,0.2,0.2 --k 3")
    assert len(unpack_labels(record.evaluations[0].labels)) == 12
    with pytest.raises(ConfigError, match="--mean 1,a: not numbers"):
        numbers("--mean", "1,a")
    assert run(cli.app, ["evaluate", "--ckpt", str(foreign), "--which", "both-ish"]).exit_code == 2


def test_queries_that_are_copies_of_search_images_are_refused_unless_allowed(
    foreign: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every query is a copy, so 1-NN is 100 %; where that is allowed, notes, command and record say so."""
    for cls in ("dark", "grey", "light"):
        for number in range(4):
            shutil.copy(pictures / "train" / cls / f"{number}.png", pictures / "val" / cls / f"{number}.png")
    out = tmp_path / "x.json"
    words = ["evaluate", "--ckpt", str(foreign), "--data", str(pictures), "--image-size", "16", "--k", "1", "--no-cache"]
    found = "12 of 12 queries (100.0%) have the bytes of a training or search image"
    refused = chain.call(tmp_path, *words, "--out", str(out))
    chain.refused(refused, f"{pictures}: {found}, more than 1%", "give --allow-shared-images")
    assert refused.out == ""
    assert not out.exists()
    allowed = chain.call(tmp_path, *words, "--json", "--out", str(out), "--allow-shared-images")
    assert allowed.code == 0, allowed
    assert found in json.loads(allowed.out)["notes"]
    assert json.loads(allowed.out)["scores"][0]["top1"] == 100
    record = read_record(out, ExternalRecord)
    assert record.command.endswith("--allow-shared-images --image-size 16 --k 1")
    assert record.evaluations[0].manifest.shared == 12
