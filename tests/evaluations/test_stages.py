"""The stages on a small prepared subset: records that can be recomputed, and files of other runs refused."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from isd_repro.config.layout import Layout
from isd_repro.config.params import BackboneConfig, Params, StoreSettings
from isd_repro.data import manifests
from isd_repro.data.manifests import Image, Manifest
from isd_repro.evaluations.encoders import load_encoders
from isd_repro.evaluations.stage import extract, run_evaluation
from isd_repro.evaluations.subject import open_run
from isd_repro.nn.backbones import build
from isd_repro.records import EvaluationRecord, read_record, unpack_labels
from isd_repro.runtime.errors import ConfigError, DataError
from isd_repro.runtime.files import sha256_file
from isd_repro.runtime.progress import Progress
from isd_repro.tensor_files import load_tensors, save_tensors
from tests.data import trees

knn = partial(run_evaluation, "knn")
linear = partial(run_evaluation, "linear")

SIDE, CLASSES, SEARCH, QUERY = 8, ("ant", "bee", "cat"), 7, 5
NARROW = BackboneConfig(arch="resnet-narrow", width=2, channels=1)
PIXELS = BackboneConfig(arch="pixels", channels=1)


@dataclass
class World:
    params: Params
    layout: Layout
    pixels: Tensor  # uint8, N x 1 x SIDE x SIDE, in the order of the manifest
    manifest: Manifest

    def run(self, stage: Any, run: str) -> str:
        text = io.StringIO()
        stage(run, self.params, self.layout, Console(file=text, force_terminal=False, width=40))
        return text.getvalue()

    def record(self, run: str, part: Any) -> EvaluationRecord:
        return read_record(self.layout.record(run, part), EvaluationRecord)


def write_encoder(
    path: Path, config: BackboneConfig, encoders: tuple[str, ...], manifest: str, seed: int = 0, run: str = ""
) -> None:
    nets: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in encoders:
            nets[name] = build(config, SIDE)
            nets[name](torch.rand(8, 1, SIDE, SIDE))
    tensors = {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}
    identity = {
        "profile": "tiny",
        "run": run or path.parent.name,
        "fingerprint": "f",
        "manifest": manifest,
        "backbone": config.model_dump(mode="json"),
        "image_size": SIDE,
        "crop_ratio": 1.0,
        "mean": [0.0],
        "std": [1.0],
        "encoders": list(encoders),
    }
    save_tensors(path, "encoder", tensors, identity)


def make_manifest() -> Manifest:
    """Sorted by (split, class, file): SEARCH train images a class, then QUERY validation images a class."""
    images = [Image("train", cls, f"{i}.png", f"{cls}-train-{i}") for cls in CLASSES for i in range(SEARCH)]
    images += [Image("val", cls, f"{i}.png", f"{cls}-val-{i}") for cls in CLASSES for i in range(QUERY)]
    cut = SEARCH * len(CLASSES)
    train = np.arange(cut, dtype=np.int64)
    return Manifest(
        "toy", "toy", {"name": "toy"}, CLASSES, ("bee",), tuple(images), train, train, np.arange(cut, len(images), dtype=np.int64)
    )


def write_prepared(folder: Path, manifest: Manifest, pixels: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    manifests.write(folder, manifest, store=trees.packed(folder, pixels.numpy(), StoreSettings(channels=1)))


def make_params() -> Params:
    def run(backbone: BackboneConfig) -> dict[str, Any]:
        view = {"crop_min": 0.5}
        return {
            "label": "a run",
            "backbone": backbone.model_dump(),
            "method": {"name": "isd"},
            "optim": {"epochs": int(backbone.arch != "pixels"), "batch_size": 4, "lr": 0.1, "schedule": {"name": "cosine"}},
            "data": {
                "subset": "toy",
                "image_size": SIDE,
                "crop_ratio": 1.0,
                "mean": [0.0],
                "std": [1.0],
                "view_student": view,
                "view_teacher": view,
            },
        }

    rule = {"name": "all"}
    return Params.model_validate(
        {
            "profile": "tiny",
            "report": {"title": "t", "caption": "c"},
            "evaluation": {
                "knn": {"k": [1, 3]},
                "linear": {"epochs": 3, "batch_size": 8, "flip": 0.0, "crop_min": 0.8, "milestones": [2], "protocol": "short"},
            },
            "subsets": {"toy": {"source": {"name": "digits", "dataset": "toy"}, "rule": rule, "store": {"channels": 1}}},
            "runs": {"isd": run(NARROW), "raw": run(PIXELS)},
        }
    )


@pytest.fixture
def world(tmp_path: Path) -> World:
    draw = torch.Generator().manual_seed(0)
    manifest = make_manifest()
    centre = 100 + 50 * torch.rand(len(CLASSES), 1, SIDE, SIDE, generator=draw)
    noise = 40 * torch.randn(len(manifest.images), 1, SIDE, SIDE, generator=draw)
    pixels = (centre[torch.from_numpy(manifest.labels)] + noise).clamp(0, 255).to(torch.uint8)
    layout = Layout(folder=tmp_path, root=tmp_path, profile="tiny")
    write_prepared(layout.prepared("toy"), manifest, pixels)
    write_encoder(layout.encoder("isd"), NARROW, ("student", "teacher"), manifest.sha256)
    write_encoder(layout.encoder("raw"), PIXELS, ("student",), manifest.sha256)
    return World(make_params(), layout, pixels, manifest)


def cosine_neighbours(world: World) -> tuple[Tensor, Tensor, Tensor]:
    """1-NN and 3-NN of raw pixels, straight from the bytes in float64, and the true labels."""
    rows = nn.functional.normalize(world.pixels.flatten(1).double(), dim=1)
    label = torch.from_numpy(world.manifest.labels)
    search, query = torch.from_numpy(world.manifest.search), torch.from_numpy(world.manifest.query)
    order = (rows[query] @ rows[search].T).sort(dim=1, descending=True).indices
    near = label[search][order[:, :3]]
    counts = torch.stack([(near == cls).sum(dim=1) for cls in range(len(CLASSES))], dim=1)
    assert (counts.max(dim=1).values > 1).any()
    return near[:, 0], counts.argmax(dim=1), label[query]


def test_pixels_score_as_their_bytes_do(world: World) -> None:
    world.run(extract, "raw")
    printed = world.run(knn, "raw")
    one, three, label = cosine_neighbours(world)
    record = world.record("raw", "knn")
    assert unpack_labels(record.labels).tolist() == label.tolist()
    assert unpack_labels(record.predictions["student/1-NN"]).tolist() == one.tolist()
    assert unpack_labels(record.predictions["student/3-NN"]).tolist() == three.tolist()
    rare = label != CLASSES.index("bee")
    expected = [
        ("1-NN", "all", int((one == label).sum()), 15),
        ("1-NN", "rare", int((one == label)[rare].sum()), 10),
        ("1-NN", "large", int((one == label)[~rare].sum()), 5),
        ("3-NN", "all", int((three == label).sum()), 15),
        ("3-NN", "rare", int((three == label)[rare].sum()), 10),
        ("3-NN", "large", int((three == label)[~rare].sum()), 5),
    ]
    assert [(s.metric, s.group, s.correct, s.n) for s in record.scores] == expected
    assert 5 < expected[0][2] < 15  # so that a mixed-up order would show
    assert printed.splitlines()[0] == f"raw student 1-NN all {100 * expected[0][2] / 15:.1f} % (n=15)"
    assert (record.manifest, record.manifest.shared) == (world.manifest.identity(), 0)
    assert record.encoder_sha256 == sha256_file(world.layout.encoder("raw"))
    assert record.features_sha256 == sha256_file(world.layout.features("raw"))
    assert "1-NN, 3-NN exact float32" in record.protocol


def test_extracted_features_are_the_encoders_own(world: World) -> None:
    printed = world.run(extract, "isd")
    assert printed.startswith("isd student, teacher: 21 search and 15 query images in ")
    first = world.layout.features("isd").read_bytes()
    tensors, identity = load_tensors(world.layout.features("isd"), "features")
    assert identity["manifest"] == world.manifest.sha256
    encoders, _ = load_encoders(world.layout.encoder("isd"))
    for name, encoder in encoders.items():
        with torch.inference_mode():
            rows = encoder(world.pixels.float() / 255)  # the evaluation's view of an image of its own size is the image
        assert torch.allclose(tensors[f"{name}.search"], rows[world.manifest.search], atol=1e-5)
        assert torch.allclose(tensors[f"{name}.query"], rows[world.manifest.query], atol=1e-5)
    assert not torch.allclose(tensors["student.query"], tensors["teacher.query"], atol=1e-2)
    world.run(extract, "isd")
    assert world.layout.features("isd").read_bytes() == first


@pytest.mark.parametrize("stage", [knn, linear])
def test_scores_and_classes_follow_from_the_stored_predictions(world: World, stage: Any) -> None:
    world.run(extract, "isd")
    printed = world.run(stage, "isd").splitlines()
    record = world.record("isd", stage.args[0])
    metrics = ("1-NN", "3-NN") if stage is knn else ("linear-last", "linear-best")
    assert set(record.predictions) == {f"{encoder}/{metric}" for encoder in ("student", "teacher") for metric in metrics}
    label = unpack_labels(record.labels)
    large = np.array([record.manifest.classes[cls] in record.manifest.large for cls in label.tolist()])
    masks = {"all": np.ones_like(large), "rare": ~large, "large": large}
    again = []
    for encoder in ("student", "teacher"):
        for metric in metrics:
            hit = unpack_labels(record.predictions[f"{encoder}/{metric}"]) == label
            again += [(encoder, metric, group, int(hit[mask].sum()), int(mask.sum())) for group, mask in masks.items()]
            per_class = {name: int(hit[label == cls].sum()) for cls, name in enumerate(record.manifest.classes)}
            assert sum(per_class.values()) == again[-3][3]
    assert [(s.encoder, s.metric, s.group, s.correct, s.n) for s in record.scores] == again
    assert printed[-len(again) :] == [f"isd {e} {m} {g} {100 * c / n:.1f} % (n={n})" for e, m, g, c, n in again]


def test_linear_repeats_itself_and_learns(world: World) -> None:
    world.run(extract, "isd")
    printed = world.run(linear, "isd")
    assert "isd linear epoch 3 lr 0.001 student/loss" in printed
    first = world.record("isd", "linear")
    world.run(linear, "isd")
    second = world.record("isd", "linear")
    assert first.predictions == second.predictions
    assert first.protocol == "short"
    assert set(first.settings["best_epoch"]) == {"student", "teacher"}
    best = {(s.encoder, s.group): s.correct for s in first.scores if s.metric == "linear-best"}
    last = {(s.encoder, s.group): s.correct for s in first.scores if s.metric == "linear-last"}
    assert all(best[key] >= last[key] for key in best if key[1] == "all")
    longer = world.params.evaluation.linear.model_copy(update={"epochs": 30, "milestones": (20,)})
    world.params = world.params.model_copy(update={"evaluation": world.params.evaluation.model_copy(update={"linear": longer})})
    world.run(extract, "raw")
    world.run(linear, "raw")
    scores = {s.metric: s.top1 for s in world.record("raw", "linear").scores if s.group == "all"}
    assert scores["linear-last"] > 60  # of 33 by chance


def test_views_visit_every_labelled_image_once_an_epoch(world: World) -> None:
    subject = open_run("isd", world.params, world.layout, Progress(Console(quiet=True)))
    search = subject.split("search")
    settings = world.params.evaluation.linear.model_copy(update={"crop_min": 1.0})
    batches = subject.augmented(search, settings)
    shown = [list(batches(epoch)) for epoch in (0, 0, 1)]
    assert [len(label) for _, label in shown[0]] == [8, 8, 5]
    images, labels = (torch.cat([batch[part] for batch in shown[0]]) for part in (0, 1))
    originals = world.pixels[world.manifest.search].float() / 255
    # a whole image need not be cut square: its mean brightness and its label still tell it from the others
    distance = (images.flatten(1)[:, None] - originals.flatten(1)[None]).square().mean(dim=2)
    seen = distance.argmin(dim=1)
    assert sorted(seen.tolist()) == list(range(len(originals)))
    assert torch.equal(labels, torch.from_numpy(world.manifest.labels)[seen])
    again = torch.cat([batch[0] for batch in shown[1]])
    other = torch.cat([batch[0] for batch in shown[2]])
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    reseeded = subject.augmented(search, settings.model_copy(update={"seed": 1}))
    assert not torch.equal(images, torch.cat([batch[0] for batch in reseeded(0)]))


def test_what_is_missing_is_named(world: World) -> None:
    with pytest.raises(ConfigError, match="no run 'isdd'"):
        world.run(extract, "isdd")
    world.layout.encoder("isd").unlink()
    with pytest.raises(DataError, match=r"encoder\.safetensors: no such file"):
        world.run(knn, "isd")


def test_k_above_the_search_set_and_a_false_paper_protocol_are_refused(world: World) -> None:
    world.run(extract, "isd")
    evaluation = world.params.evaluation
    knn_settings = evaluation.knn.model_copy(update={"k": (1, 22)})
    linear_settings = evaluation.linear.model_copy(update={"protocol": "paper"})
    changed = evaluation.model_copy(update={"knn": knn_settings, "linear": linear_settings})
    world.params = world.params.model_copy(update={"evaluation": changed})
    with pytest.raises(ConfigError, match="k = 22: the search set has 21 images"):
        world.run(knn, "isd")
    with pytest.raises(ConfigError, match=r"'paper' with values that are not the paper's"):
        world.run(linear, "isd")
