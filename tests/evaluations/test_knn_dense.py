"""Dense queries: which images they are, and their neighbours against a search written out in float64."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from isd_repro.config import params
from isd_repro.data.manifests import Image, Manifest
from isd_repro.data.subsets import select
from isd_repro.evaluations.features import load_features
from isd_repro.evaluations.knn_dense import Config, dense_queries, without_itself
from isd_repro.evaluations.neighbour_search import nearest
from isd_repro.evaluations.stage import extract, run_evaluation
from isd_repro.records import unpack_labels
from isd_repro.runtime.errors import ConfigError
from isd_repro.runtime.files import sha256_file
from tests.data import trees
from tests.evaluations.test_protocol_stages import configure
from tests.evaluations.test_stages import CLASSES, NARROW, World, world, write_encoder, write_prepared  # noqa: F401 - a fixture

IMAGES = trees.located({f"n{number:02d}": 20 + number for number in range(12)})
RULE = {"name": "halves", "tuning": 0, "part": "second", "halving": 3, "large": 2, "rare_images": 5, "seed": 7}


def drawn(rule: dict[str, object], search: int | None = None) -> Manifest:
    """The manifest of a rule's images."""
    chosen = select(IMAGES, trees.subset(params.Halves.model_validate(rule), search=search), "x")
    roles = (chosen.train, chosen.search, chosen.query)
    used = sorted(set(np.concatenate(roles).tolist()), key=lambda at: (IMAGES[at].split, IMAGES[at].cls, IMAGES[at].file))
    images = tuple(Image(IMAGES[at].split, IMAGES[at].cls, IMAGES[at].file, "") for at in used)
    place = {at: position for position, at in enumerate(used)}
    train, searched, query = (np.array(sorted(place[at] for at in role.tolist()), dtype=np.int64) for role in roles)
    return Manifest("toy", "x", rule, chosen.classes, chosen.large, images, train, searched, query)


def files(manifest: Manifest, positions: np.ndarray) -> set[tuple[str, str]]:
    return {(manifest.images[at].cls, manifest.images[at].file) for at in positions.tolist()}


def test_a_set_and_its_balanced_control_have_the_same_dense_queries() -> None:
    """They are the rare classes' images that neither trains on."""
    both = (drawn(RULE), drawn(RULE | {"per_class": 9}))
    expected = {
        (cls, file)
        for cls, file in files(both[0], both[0].search) - files(both[0], both[0].train) - files(both[1], both[1].train)
        if cls not in both[0].large
    }
    sizes = Counter(image.cls for image in IMAGES if image.split == "train")
    assert Counter(cls for cls, _ in expected) == {cls: sizes[cls] - 9 for cls in both[0].classes if cls not in both[0].large}
    for manifest in both:
        assert files(manifest, manifest.search[dense_queries(manifest, 9).numpy()]) == expected
    alone = files(both[0], both[0].search) - files(both[0], both[0].train)
    assert files(both[0], both[0].search[dense_queries(both[0], None).numpy()]) == alone > expected


def test_images_that_a_run_trains_on_are_no_dense_queries() -> None:
    control = drawn(RULE | {"per_class": 9})
    for manifest, trained in (
        (control, 8),
        (replace(control, rule=RULE | {"seed": 8}), 9),  # another draw than that of the images
        (drawn(RULE, search=15), 9),  # the order of a draw is that of all train images
    ):
        with pytest.raises(ConfigError, match=f"evaluation.knn_dense.trained: {trained}, but subset 'x' trains on"):
            dense_queries(manifest, trained)


def test_an_image_is_not_its_own_neighbour_and_its_copies_are() -> None:
    label = torch.tensor([2, 1, 1, 1, 0])
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    every = torch.arange(5)
    found = without_itself(nearest(bank, label, bank, 3, torch.device("cpu")), every)
    assert found.tolist() == [[1, 2], [2, 3], [1, 3], [1, 2], [1, 2]], "the first of equals is not always among the k + 1"


def test_dense_queries_are_answered_by_the_other_images(world: World) -> None:  # noqa: F811
    """Here `bee` is large, the others train on two of their seven images, and five are queries."""
    kept = np.isin(np.arange(21) % 7, (1, 4)) | (world.manifest.labels[:21] == CLASSES.index("bee"))
    manifest = replace(world.manifest, train=np.flatnonzero(kept))
    write_prepared(world.layout.prepared("toy"), manifest, world.pixels)
    write_encoder(world.layout.encoder("isd"), NARROW, ("student", "teacher"), manifest.sha256)
    configure(world, knn_dense=Config(k=(1, 3)))
    world.run(extract, "isd")
    printed = world.run(partial(run_evaluation, "knn_dense"), "isd")
    record, features = (
        world.record("isd", "knn_dense"),
        load_features(world.layout.features("isd"), sha256_file(world.layout.encoder("isd"))),
    )
    dense, label = np.flatnonzero(~kept), features.search_label.numpy()
    truth = [*features.query_label.tolist(), *label[dense].tolist()]
    assert unpack_labels(record.labels).tolist() == truth
    assert len(truth) == 15 + 10
    for encoder in ("student", "teacher"):
        bank, query = (rows[encoder].double().numpy() for rows in (features.search, features.query))
        bank, query = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank, query))
        similarity = np.concatenate([query, bank[dense]]) @ bank.T
        similarity[15 + np.arange(10), dense] = -np.inf
        near = label[np.argsort(-similarity, axis=1)]
        majority = [min(range(3), key=lambda cls: (-votes.count(cls), cls)) for votes in near[:, :3].tolist()]
        for metric, expected in (("1-NN-dense", near[:, 0].tolist()), ("3-NN-dense", majority)):
            assert unpack_labels(record.predictions[f"{encoder}/{metric}"]).tolist() == expected
            right = [found == cls for found, cls in zip(expected, truth, strict=True)]
            rare = [hit for hit, cls in zip(right, truth, strict=True) if cls != CLASSES.index("bee")]
            scores = {one.group: (one.correct, one.n) for one in record.scores if (one.encoder, one.metric) == (encoder, metric)}
            assert scores == {
                "all": (sum(right), 25),
                "rare": (sum(rare), 20),
                "large": (sum(right) - sum(rare), 5),
            }
    assert "isd student 1-NN-dense rare " in printed
