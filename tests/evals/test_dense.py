"""Dense queries: which images they are, for an unbalanced draw and its balanced control, and that none answers itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from isd_repro import params
from isd_repro.data.manifests import Image, Manifest
from isd_repro.data.packing import rule_of
from isd_repro.data.subsets import select
from isd_repro.errors import DataError
from isd_repro.evals.dense import leave_one_out, unused
from tests.data import trees

COUNTS = {f"n{number:02d}": 20 + number for number in range(12)}
LISTED = sorted(trees.located(COUNTS), key=lambda image: (image.split, image.cls, image.file))
CPU = torch.device("cpu")


def manifest(search: int | None = None, **values: object) -> Manifest:
    rule = {"name": "halves", "tuning": 0, "part": "first", "large": 2, "rare_images": 5, "seed": 3, **values}
    subset = trees.subset(params.Halves.model_validate(rule), search=search)
    drawn = select(LISTED, subset, "x")
    used = sorted({*drawn.train.tolist(), *drawn.search.tolist(), *drawn.query.tolist()})
    place = {at: row for row, at in enumerate(used)}
    images = tuple(Image(LISTED[at].split, LISTED[at].cls, LISTED[at].file, "0" * 64) for at in used)
    roles = (np.array([place[at] for at in role.tolist()], dtype=np.int64) for role in (drawn.train, drawn.search, drawn.query))
    return Manifest("toy", "x", dict(rule_of(subset)), drawn.classes, drawn.large, images, *roles)


def files(one: Manifest, positions: Tensor) -> set[str]:
    return {one.images[int(one.search[at])].file for at in positions.tolist()}


def test_a_draw_and_its_control_get_the_same_queries_and_train_on_none() -> None:
    cut, even = manifest(), manifest(per_class=9)
    found = unused(cut, 9)
    assert found.tolist() == sorted(set(found.tolist()))
    assert files(cut, found) == files(even, unused(even, 9))
    for one in (cut, even):
        asked = files(one, unused(one, 9))
        assert asked.isdisjoint({one.images[at].file for at in one.train.tolist()})
        by_class = Counter(file.split("_")[0] for file in asked)
        assert by_class == {cls: COUNTS[cls] - 9 for cls in one.classes if cls not in one.large}


def test_queries_that_training_has_seen_are_refused() -> None:
    with pytest.raises(DataError, match=r"4 train images of class n\d\d are behind the first 5"):
        unused(manifest(per_class=9), 5)
    with pytest.raises(DataError, match="searches a part of its train images"):
        unused(manifest(search=8), 9)


def oracle(search: Tensor, label: Tensor, asked: list[int], k: int) -> list[int]:
    """By sorting all other images, one query at a time."""
    rows = torch.nn.functional.normalize(search, dim=1)
    found = []
    for at in asked:
        order = sorted(
            (row for row in range(len(search)) if row != at), key=lambda row: (-float(rows[row] @ rows[at]), int(label[row]), row)
        )
        votes = Counter(int(label[row]) for row in order[:k])
        found.append(min(cls for cls, count in votes.items() if count == max(votes.values())))
    return found


def test_no_image_answers_itself() -> None:
    draws = torch.Generator().manual_seed(0)
    search, label = torch.randint(-3, 4, (60, 4), generator=draws).float() + 0.5, torch.randint(5, (60,), generator=draws)
    asked = torch.arange(0, 60, 7)
    found = leave_one_out(search, label, asked, (1, 5), CPU)
    for k in (1, 5):
        assert found[k].tolist() == oracle(search, label, asked.tolist(), k)
    assert found[1].tolist() != label[asked].tolist()


def test_copies_answer_each_other() -> None:
    """Four copies with four labels: an image with a high label is not among its own two nearest."""
    search, label = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]]), torch.tensor([0, 1, 2, 3, 4])
    assert leave_one_out(search, label, torch.tensor([0, 3, 4]), (1,), CPU)[1].tolist() == [1, 0, 0]
