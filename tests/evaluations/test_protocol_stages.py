"""Stages `few_label` and `transfer`: their records can be recomputed, and what they choose never depends on a test label."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from isd_repro.data import eval_loader as pictures
from isd_repro.data import transfer_sets
from isd_repro.data.eval_loader import Frame, StoreReader
from isd_repro.data.labelled import drawn
from isd_repro.data.manifests import Split, open_prepared
from isd_repro.evaluations import linear_head
from isd_repro.evaluations import transfer as module
from isd_repro.evaluations.encoders import load_encoders
from isd_repro.evaluations.features import load_features
from isd_repro.evaluations.few_label import Config as FewLabel
from isd_repro.evaluations.linear import among_five
from isd_repro.evaluations.linear_head import LinearTask
from isd_repro.evaluations.stage import extract, run_evaluation
from isd_repro.evaluations.transfer import Config as Transfer
from isd_repro.records import TargetsRecord, read_record, unpack_labels
from isd_repro.runtime.errors import ConfigError, DataError
from isd_repro.runtime.files import sha256_file
from tests.evaluations.test_stages import NARROW, SIDE, World, world, write_encoder  # noqa: F401 - a fixture

few_label = partial(run_evaluation, "few_label")
transfer = partial(run_evaluation, "transfer")

CPU = torch.device("cpu")


def configure(world: World, **blocks: Any) -> None:  # noqa: F811
    evaluation = world.params.evaluation.model_copy(update=blocks)
    world.params = world.params.model_copy(update={"evaluation": evaluation})


# --- few labels -------------------------------------------------------------------------------------------------------


def test_top_five_is_the_label_where_it_is_among_the_guesses() -> None:
    label = torch.tensor([3, 1, 4, 0])
    first = torch.tensor([3, 2, 2, 1])
    among = torch.tensor([[3, 0, 1, 2, 4], [2, 0, 3, 4, 5], [2, 3, 4, 0, 1], [1, 2, 3, 4, 0]])
    assert among_five(first, among, label).tolist() == [3, 2, 4, 0]


def test_few_labels_equal_the_linear_protocol_on_the_labelled_images(world: World) -> None:  # noqa: F811
    """Done here by hand: features, statistics, views and epochs of the labelled images alone."""
    configure(world, few_label=FewLabel(fractions=(0.3, 1.0), seed=5))
    world.run(extract, "isd")
    printed = world.run(few_label, "isd")
    record = world.record("isd", "few_label")
    prepared = open_prepared(world.layout.prepared("toy"))
    search = prepared.split("search")
    settings = world.params.evaluation.linear
    encoders, identity = load_encoders(world.layout.encoder("isd"))
    features = load_features(world.layout.features("isd"), sha256_file(world.layout.encoder("isd")))
    frame = Frame(identity.image_size, identity.crop_ratio, identity.mean, identity.std)
    for share, fraction in (("30", 0.3), ("100", 1.0)):
        at = torch.tensor(drawn(search.label, fraction, 5))
        assert len(at) == {"30": 6, "100": 21}[share]
        part = Split(search.index[at], search.label[at])
        assert record.settings["labelled"][share]["images"] == len(at)
        task = LinearTask(
            search={name: rows[at] for name, rows in features.search.items()},
            query=features.query,
            query_label=features.query_label,
            classes=3,
            train_batches=pictures.augmented(StoreReader(prepared.store), part, frame, settings, CPU),
        )
        for name, out in linear_head.train(encoders, task, settings, CPU).items():
            assert unpack_labels(record.predictions[f"{name}/few-{share}pct-last"]).tolist() == out.last.tolist()
            assert unpack_labels(record.predictions[f"{name}/few-{share}pct-best"]).tolist() == out.best.tolist()
            hits = int((out.last5 == features.query_label[:, None]).any(dim=1).sum())
            stated = {f"{s.encoder} {s.metric} {s.group}": (s.correct, s.n) for s in record.scores}
            assert stated[f"{name} few-{share}pct-last-top5 all"] == (hits, 15)
            assert record.settings["best_epoch"][share][name] == out.best_epoch
    assert record.kind == "few_label"
    assert record.protocol == "linear, short, on the labelled images alone"
    assert {score.group for score in record.scores} == {"all", "rare", "large"}
    assert "isd few labels: 6 images, 30 %, drawn" in printed
    again = world.record("isd", "few_label").predictions
    world.run(few_label, "isd")
    assert world.record("isd", "few_label").predictions == again


# --- transfer ---------------------------------------------------------------------------------------------------------

NAMES = ("bird", "cat", "dog")


def write_target(root: Path) -> None:
    """Grey stripes of a direction for each class under noise, PNG so that pixels are exact."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 8)):
        for label, cls in enumerate(NAMES):
            (root / part / cls).mkdir(parents=True)
            for number in range(count):
                pattern = np.indices((SIDE, SIDE))[label % 2] * (1 + label // 2) % 2 * 120.0
                pixels = (pattern + draw.normal(60, 40, (SIDE, SIDE))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / cls / f"{number:02d}.png")


@pytest.fixture
def target(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    root = tmp_path / "target"
    write_target(root)
    monkeypatch.setenv("ISD_CIFAR10_ROOT", str(root))
    monkeypatch.setenv("ISD_STATE_ROOT", str(tmp_path))
    configure(world, transfer=Transfer(sets=("cifar10-folder",), c_min=1e-3, c_max=1e3, c_values=7))
    return root


def read(world: World, run: str = "isd") -> TargetsRecord:  # noqa: F811
    return read_record(world.layout.record(run, "transfer"), TargetsRecord)


def test_the_record_follows_from_its_predictions(world: World, target: Path) -> None:  # noqa: F811
    printed = world.run(transfer, "isd")
    record = read(world)
    [one] = record.evaluations
    label = unpack_labels(one.labels)
    assert label.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    for name in ("student", "teacher"):
        predicted = unpack_labels(one.predictions[f"{name}/transfer"])
        hits = (predicted == label).tolist()
        [score] = [score for score in one.scores if score.encoder == name]
        assert (score.metric, score.group, score.correct, score.n) == ("transfer", "all", sum(hits), 24)
        shares = [sum(hits[8 * cls : 8 * cls + 8]) / 8 for cls in range(3)]
        assert one.mean_per_class[f"{name}/transfer"] == pytest.approx(100 * sum(shares) / 3)
        assert f"isd {name} cifar10-folder top-1 {100 * sum(hits) / 24:.1f} %" in printed
        assert sum(hits) > 10, "of 8 by chance"
    assert (one.manifest.train, one.manifest.search, one.manifest.query) == (48, 60, 24)
    assert one.manifest.classes == NAMES
    assert one.metric == "top1"
    assert record.manifest == world.manifest.identity()
    assert record.encoder_sha256 == one.encoder_sha256 == sha256_file(world.layout.encoder("isd"))
    assert not (world.layout.root / ".state").exists() or not any((world.layout.root / ".state").iterdir())
    first = record.evaluations
    world.run(transfer, "isd")
    assert [part.predictions for part in read(world).evaluations] == [part.predictions for part in first]
    assert [part.features_sha256 for part in read(world).evaluations] == [part.features_sha256 for part in first]


def test_predictions_are_those_of_the_encoders_own_features(world: World, target: Path) -> None:  # noqa: F811
    """Raw pixels as the encoder: features, division and classifier put together here from the files."""
    from isd_repro.evaluations import transfer as solver

    world.run(transfer, "raw")
    [one] = read(world, "raw").evaluations

    def load(part: str) -> tuple[Tensor, Tensor]:
        paths = sorted((target / part).rglob("*.png"))
        rows = [torch.from_numpy(np.asarray(Image.open(path)).copy()).flatten().float() / 255 for path in paths]
        return torch.stack(rows), torch.tensor([NAMES.index(path.parent.name) for path in paths])

    (known, label), (asked, truth) = load("train"), load("test")
    parts: Any = ["train"] * 60 + ["test"] * 24
    division = transfer_sets.divide("cifar10-folder", parts, torch.cat([label, truth]), 0)
    train, val = ((known[rows], label[rows]) for rows in (division.train, division.val))
    answer = solver.answer(train, val, asked, 3, lambda a, b: float((a == b).mean()), world.params.evaluation.transfer, CPU)
    assert unpack_labels(one.predictions["student/transfer"]).tolist() == answer.predicted.tolist()
    assert one.settings["chosen"]["student"]["c"] == answer.choice.c


def test_shuffled_test_labels_change_no_choice(world: World, target: Path) -> None:  # noqa: F811
    """Test images move to other classes: same C, same validation scores, same answer to every image; only the score moves."""
    world.run(transfer, "isd")
    [before] = read(world).evaluations
    answers = {}
    for name in ("student", "teacher"):
        rows = unpack_labels(before.predictions[f"{name}/transfer"]).tolist()
        answers[name] = {(cls, at): rows[8 * NAMES.index(cls) + at] for cls in NAMES for at in range(8)}
    moved = dict(zip(NAMES, (*NAMES[1:], NAMES[0]), strict=True))  # each class's images to the next class
    for cls in NAMES:
        (target / "test" / cls).rename(target / "test" / f"was-{cls}")
    for cls in NAMES:
        (target / "test" / f"was-{cls}").rename(target / "test" / moved[cls])
    world.run(transfer, "isd")
    [after] = read(world).evaluations
    assert after.settings == before.settings
    assert after.manifest.sha256 != before.manifest.sha256
    for name in ("student", "teacher"):
        rows = unpack_labels(after.predictions[f"{name}/transfer"]).tolist()
        assert {(cls, at): rows[8 * NAMES.index(moved[cls]) + at] for cls in NAMES for at in range(8)} == answers[name]
    assert [score.correct for score in after.scores] != [score.correct for score in before.scores]


def test_an_interrupted_stage_goes_on(world: World, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    shutil.copytree(target, world.layout.root / "food")
    original, worked = module.on_target, []

    def evaluate(subject: Any, config: Any, key: Any) -> Any:
        worked.append(key)
        if len(worked) == 2:
            raise KeyboardInterrupt
        return original(subject, config, "cifar10-folder")

    sets: Any = ("cifar10-folder", "food101")  # the second stands for any other set
    configure(world, transfer=world.params.evaluation.transfer.model_copy(update={"sets": sets}))
    monkeypatch.setattr(module, "on_target", evaluate)
    monkeypatch.setattr(transfer_sets, "root_of", lambda key: target)
    with pytest.raises(KeyboardInterrupt):
        world.run(transfer, "isd")
    assert not world.layout.record("isd", "transfer").exists()
    world.run(transfer, "isd")
    assert worked == ["cifar10-folder", "food101", "food101"], "the first set is not worked on again"
    assert len(read(world).evaluations) == 2


def test_what_is_wrong_is_named_before_anything_is_read(world: World, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    sets: Any = ("cifar10-folder", "dtd")
    configure(world, transfer=Transfer(sets=sets))
    monkeypatch.setattr(module, "on_target", lambda *given: pytest.fail("worked on a set while another is missing"))
    with pytest.raises(DataError, match="ISD_TRANSFER_ROOT is not set"):
        world.run(transfer, "isd")
    configure(world, transfer=Transfer())
    with pytest.raises(ConfigError, match=r"evaluation\.transfer\.sets is empty"):
        world.run(transfer, "isd")
    configure(world, transfer=Transfer(sets=("cifar10-folder",)))
    write_encoder(world.layout.encoder("isd"), NARROW, ("student",), "another manifest")
    with pytest.raises(DataError, match="manifest changed since it was made"):
        world.run(transfer, "isd")


def test_few_label_refuses_what_linear_refuses(world: World) -> None:  # noqa: F811
    world.run(extract, "isd")
    configure(world, linear=world.params.evaluation.linear.model_copy(update={"protocol": "paper"}))
    with pytest.raises(ConfigError, match="'paper' with values that are not the paper's"):
        world.run(few_label, "isd")
