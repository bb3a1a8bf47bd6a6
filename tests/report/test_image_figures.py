"""The command `figures`: what it says can be recomputed, bad input is refused, and names of strangers cannot harm a page."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markupsafe import escape
from threadpoolctl import threadpool_info, threadpool_limits

from isd_repro import cli
from isd_repro.data.manifests import Manifest
from isd_repro.evaluations.encoders import load_encoders
from isd_repro.report import clusters, tsne
from isd_repro.report.clusters import scikit_learn
from isd_repro.report.figures import embedding
from isd_repro.runtime.errors import DataError, UserError
from isd_repro.runtime.files import sha256_file
from isd_repro.tensor_files import load_tensors, save_tensors
from tests.evaluations.test_stages import write_encoder, write_prepared
from tests.report.figures_world import CLASSES, NARROW, QUERY, World, make_manifest, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def test_probabilities_are_those_of_the_equations(world: World) -> None:
    """The bank takes 64 images and the subset has 27, so that the anchors are all of them."""
    near = world.draw("isd", queries=99)["anchors"]
    assert near["bank"] == {"images": 27, "asked": 64, "split": "train", "view": "evaluation", "encoder": "teacher"}
    assert near["embedding"]["teacher_as_in_training"] is True
    teacher, student = world.rows("isd", "teacher"), world.rows("isd", "student")
    assert sorted(row["query"]["position"] for row in near["shown"]) == world.manifest.query.tolist()
    entropies = []
    for row in near["shown"]:
        at = row["query"]["position"]
        similar = [float(teacher[at] @ teacher[anchor]) for anchor in range(27)]
        other = [float(student[at] @ teacher[anchor]) for anchor in range(27)]
        p_teacher = [math.exp(value / 0.02) for value in similar]
        p_student = [math.exp(value / 0.1) for value in other]
        p_teacher, p_student = ([value / sum(p) for value in p] for p in (p_teacher, p_student))
        entropies.append(-sum(p * math.log(p) for p in p_teacher if p))
        assert row["spread"]["teacher"]["entropy"] == pytest.approx(entropies[-1], rel=1e-3)
        assert row["spread"]["teacher"]["top10"] == pytest.approx(sum(sorted(p_teacher)[-10:]), rel=1e-3)
        assert row["spread"]["student"]["highest"] == pytest.approx(max(p_student), rel=1e-3)
        assert len(row["anchors"]) == 10
        best = sorted(similar, reverse=True)[:10]
        for card, expected in zip(row["anchors"], best, strict=True):
            assert card["similarity"] == pytest.approx(expected, abs=1e-5)
            assert card["similarity"] == pytest.approx(similar[card["position"]], abs=1e-5)
            assert card["probability"]["teacher"] == pytest.approx(p_teacher[card["position"]], rel=1e-3)
            assert card["probability"]["student"] == pytest.approx(p_student[card["position"]], rel=1e-3)
            image = world.manifest.images[card["position"]]
            assert (card["class"], card["file"], card["split"]) == (image.cls, image.file, "train")
    assert near["mean_spread"]["teacher"]["entropy"] == pytest.approx(sum(entropies) / 18, rel=1e-3)
    assert near["one_hot"]["entropy"] == near["one_hot"]["each anchor"] == 0


def test_what_is_not_the_embedding_of_training_is_said_to_be_none(world: World) -> None:
    near = world.draw("isd-mlp")["anchors"]
    assert near["bank"]["images"] == 8
    assert near["embedding"]["teacher_as_in_training"] is False
    assert "projector" in near["embedding"]["teacher"]
    assert "These are not the embeddings that training compared" in world.files("isd-mlp")["anchors.html"].decode()
    world.draw("isd")
    assert "These are not the embeddings" not in world.files("isd")["anchors.html"].decode()


def test_a_method_without_a_soft_target_gets_none(world: World) -> None:
    near = world.draw("moco")["anchors"]
    assert near["tau"] == {"teacher": None, "student": 0.2}
    assert set(near["mean_spread"]) == {"student"}
    assert all(set(card["probability"]) == {"student"} for row in near["shown"] for card in row["anchors"])
    assert "This method has no soft target over anchors" in world.files("moco")["anchors.html"].decode()
    facts = world.draw("raw")
    assert facts["anchors"]["mean_spread"] == {}
    assert facts["anchors"]["bank"]["encoder"] == "student"


def test_cluster_numbers_follow_from_each_other(world: World) -> None:
    found = world.draw("raw", k=4, clusters=99, members=99)["clusters"]
    assert (found["images"], found["k"], found["empty"]) == (25, 4, 0)
    every = {cluster["cluster"]: cluster for cluster in found["all"]}
    hits = 0
    assignment: dict[int, int] = {}
    for row in found["shown"]:
        names = [CLASSES[world.manifest.labels[image["position"]]] for image in row["members"]]
        about = every[row["cluster"]]
        most = max(names.count(name) for name in names)
        hits += most
        assert about["size"] == len(names)
        assert names.count(about["class"]) == most
        assert about["purity"] == pytest.approx(100 * most / len(names))
        assignment |= {image["position"]: row["cluster"] for image in row["members"]}
    assert sorted(assignment) == world.manifest.search.tolist(), "every image is in one cluster"
    assert found["purity"] == pytest.approx(100 * hits / 25)
    assert found["purity"] > found["purity_of_shuffled_labels"] > 100 / 3
    packed = np.array([assignment[position] for position in world.manifest.search.tolist()], dtype="<i8").tobytes()
    assert found["assignment_sha256"] == hashlib.sha256(packed).hexdigest()


def test_the_drawing_shows_every_point_once_in_its_class(world: World) -> None:
    facts = world.draw("isd")
    drawn = facts["tsne"]
    assert [panel["epoch"] for panel in drawn["panels"]] == [None]
    assert drawn["image_of_point"] == world.manifest.query.tolist()
    assert [drawn["classes"][cls] for cls in drawn["class_of_point"]] == [CLASSES[at // QUERY] for at in range(18)]
    (dots,) = embedding(drawn).draw().axes[0].collections
    assert dots.get_offsets().tolist() == [pytest.approx(point) for point in drawn["panels"][0]["points"]]
    assert len({tuple(colour) for colour in dots.get_facecolors().tolist()}) == len(CLASSES)


def test_a_second_call_writes_equal_bytes_and_everything_is_traced(world: World) -> None:
    facts = world.draw("isd", seed=1)
    first = world.files("isd")
    assert sorted(first) == [".gitignore", "anchors.html", "clusters.html", "figures.json", "tsne.svg"]
    assert first[".gitignore"] == b"*\n"
    hashes = {name: hashlib.sha256(first[name]).hexdigest() for name in ("anchors.html", "clusters.html", "tsne.svg")}
    assert facts["files"] == hashes
    assert facts["manifest"] == world.manifest.sha256
    assert facts["encoder_sha256"] == sha256_file(world.layout.encoder("isd"))
    assert facts["features_sha256"] == sha256_file(world.layout.features("isd"))
    world.draw("isd", seed=1)
    assert world.files("isd") == first
    other = world.draw("isd", seed=2)
    assert all(world.files("isd")[name] != first[name] for name in ("clusters.html", "anchors.html"))
    assert other["tsne"]["panels"][0]["points"] == facts["tsne"]["panels"][0]["points"], "every query image is shown: no draw"


@pytest.mark.parametrize("name", ["clusters.html", "anchors.html"])
def test_names_of_strangers_are_words_and_no_markup(world: World, name: str) -> None:
    world.draw("isd", clusters=99, members=99, queries=99)
    page = world.files("isd")[name].decode()
    for cls in CLASSES:
        assert escape(f'{cls}, 3".png') in page
    assert not re.search(r"<(script|co|i>toy|b>)", page)
    assert set(re.findall(r'src="(.{22})', page)) == {"data:image/png;base64,"}
    assert set(re.findall(r'href="(.*?)"', page)) <= {"clusters.html", "anchors.html", "tsne.svg", "figures.json"}


def snapshot(world: World, epoch: str, seed: int, **changes: Any) -> Path:
    path = world.layout.folder / "runs" / "isd" / "snapshots" / f"epoch-{epoch}.safetensors"
    write_encoder(path, NARROW, ("student", "teacher"), world.manifest.sha256, seed=seed)
    tensors, identity = load_tensors(path, "encoder")
    identity = {key: value for key, value in identity.items() if key not in {"kind", "format"}}
    save_tensors(path, "encoder", tensors, {**identity, "run": "isd", **changes})
    return path


def test_one_panel_for_each_snapshot_in_the_order_of_epochs(world: World) -> None:
    for epoch in ("0100", "00050", "700"):
        snapshot(world, epoch, seed=int(epoch))
    second = snapshot(world, "00020", seed=8)
    (second.parent / "notes.txt").write_text("not a snapshot")
    facts = world.draw("isd")
    panels = facts["tsne"]["panels"]
    assert [panel["epoch"] for panel in panels] == [20, 50, 100, 700, None]
    assert panels[0]["sha256"] == sha256_file(second)
    net = load_encoders(second)[0]["student"]
    query = torch.from_numpy(world.manifest.query)
    with torch.inference_mode():
        rows = torch.nn.functional.normalize(net(world.pixels[query].float() / 255).double(), dim=1)
    similar = (rows @ rows.T).fill_diagonal_(-1)
    label = torch.from_numpy(world.manifest.labels)[query]
    assert panels[0]["neighbours"] == pytest.approx(100 * float((label[similar.argmax(dim=1)] == label).double().mean()))
    assert len({panel["sha256"] for panel in panels}) == 5
    svg = world.files("isd")["tsne.svg"].decode()
    assert svg.index(">Epoch 20: ") < svg.index(">Epoch 100: ") < svg.index(">Final encoder: ")


@pytest.mark.parametrize("change", [{"run": "moco"}, {"fingerprint": "other"}, {"manifest": "0" * 64}])
def test_a_snapshot_of_another_run_is_refused(world: World, change: dict[str, str]) -> None:
    path = snapshot(world, "00001", seed=1, **change)
    with pytest.raises(DataError) as error:
        world.draw("isd")
    assert path.name in error.value.message
    assert next(iter(change)) in error.value.message
    assert not world.folder("isd").exists()


def test_features_of_another_encoder_and_images_of_another_draw_are_refused(world: World) -> None:
    other = make_manifest()
    other = Manifest(other.dataset, "toy", other.rule, CLASSES, ("cat",), other.images, other.train, other.search, other.query)
    write_prepared(world.layout.prepared("toy"), other, world.pixels)
    with pytest.raises(DataError, match="manifest changed"):
        world.draw("isd")
    write_encoder(world.layout.encoder("isd"), NARROW, ("student", "teacher"), world.manifest.sha256, seed=9)
    with pytest.raises(DataError, match="made by encoder file"):
        world.draw("isd")


@pytest.mark.parametrize(("module", "extra"), [("sklearn.exceptions", "figures"), ("jinja2", "report")])
def test_a_missing_package_is_said_before_the_work(
    world: World, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    world.layout.features("isd").unlink()  # which would be the next thing to be missed
    with pytest.raises(UserError) as error:
        world.draw("isd")
    assert f"isd-repro[{extra}]" in error.value.hint


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("isd raw --clusters 2 --members 3 --queries 1 --seed 5 --k 6", 0, ""),
        ("ids", 3, "did you mean 'isd'"),
        ("isd --k 26", 3, "26 clusters of 25 images"),
    ],
)
def test_the_command_line(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(world.layout.folder)
    monkeypatch.setattr(sys, "argv", ["isd-repro", "figures", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr().err
    assert (int(end.value.code or 0), "Traceback" in told) == (code, False)
    assert words in told
    for run in ("isd", "raw") if not code else ():
        facts = json.loads(world.files(run)["figures.json"])
        assert [len(row["members"]) <= 3 for row in facts["clusters"]["shown"]] == [True, True]
        assert (facts["seed"], facts["clusters"]["k"], len(facts["anchors"]["shown"])) == (5, 6, 1)


def test_one_thread_inside_and_the_old_number_after() -> None:
    with threadpool_limits(2):
        before = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
        assert 2 in before.values()
        with scikit_learn():
            assert {pool["num_threads"] for pool in threadpool_info()} == {1}
        after = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
        assert before.items() <= after.items()


def test_a_collapsed_encoder_leaves_clusters_empty() -> None:
    found = clusters.k_means(torch.ones(30, 4), 3, seed=0)
    counts = clusters.counts(torch.from_numpy(found.labels_).long(), torch.arange(30) % 3, 3)
    assert sorted(counts.tolist()) == [[0, 0, 0], [0, 0, 0], [10, 10, 10]]


def test_ten_classes_and_a_hundred_images_of_each_at_most() -> None:
    label = torch.arange(12).repeat_interleave(torch.tensor([150, 120, *[3] * 10]))
    for seed in range(20):
        chosen = tsne.choose(label, torch.Generator().manual_seed(seed))
        kept = label[chosen]
        assert len(kept.unique()) == 10
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        for cls in kept.unique().tolist():
            assert int((kept == cls).sum()) == min(100, int((label == cls).sum()))
    with pytest.raises(DataError, match="3 query images"):
        tsne.choose(torch.tensor([0, 1, 1]), torch.Generator().manual_seed(0))


def test_a_collapsed_encoder_is_drawn_all_the_same() -> None:
    points, _ = tsne.draw(torch.full((12, 4), 0.5), seed=0)
    assert np.isfinite(points).all()
