"""The command `figures`: what it says can be recomputed, and names of strangers cannot harm a page."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape

from isd_repro.report.figures import embedding
from isd_repro.runtime.files import sha256_file
from tests.report.figures_world import CLASSES, QUERY, World, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


# --- what is said -------------------------------------------------------------------------------------------------------


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


# --- equal bytes, and their traces --------------------------------------------------------------------------------------


def test_a_second_call_writes_equal_bytes_and_another_seed_others(world: World) -> None:
    world.draw("isd", seed=1)
    first = world.files("isd")
    assert sorted(first) == [".gitignore", "anchors.html", "clusters.html", "figures.json", "tsne.svg"]
    world.draw("isd", seed=1)
    assert world.files("isd") == first
    facts = world.draw("isd", seed=2)
    other = world.files("isd")
    assert other["clusters.html"] != first["clusters.html"]
    assert other["anchors.html"] != first["anchors.html"]
    assert facts["tsne"]["panels"][0]["points"] == json.loads(first["figures.json"])["tsne"]["panels"][0]["points"], (
        "all query images are shown and t-SNE starts from their principal axes: no draw is left"
    )


def test_everything_is_traced(world: World) -> None:
    facts = world.draw("isd")
    files = world.files("isd")
    assert facts["files"] == {
        name: hashlib.sha256(files[name]).hexdigest() for name in ("anchors.html", "clusters.html", "tsne.svg")
    }
    assert facts["manifest"] == world.manifest.sha256
    assert facts["encoder_sha256"] == sha256_file(world.layout.encoder("isd"))
    assert facts["features_sha256"] == sha256_file(world.layout.features("isd"))
    assert {"python", "torch", "scikit-learn"} <= set(facts["versions"])
    assert files[".gitignore"] == b"*\n"


# --- strangers' names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clusters.html", "anchors.html"])
def test_names_of_strangers_are_words_and_no_markup(world: World, name: str) -> None:
    world.draw("isd", clusters=99, members=99, queries=99)
    page = world.files("isd")[name].decode()
    for cls in CLASSES:
        assert escape(f'{cls}, 3".png') in page
    assert not re.search(r"<(script|co|i>toy|b>)", page)
    assert set(re.findall(r'src="(.{22})', page)) == {"data:image/png;base64,"}
    assert set(re.findall(r'href="(.*?)"', page)) <= {"clusters.html", "anchors.html", "tsne.svg", "figures.json"}
