"""Batches are a pure function of the seed and the step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from isd_repro.config.params import Data, Jitter, View
from isd_repro.config.params import Store as Packing
from isd_repro.data.loader import Batches, generator_of
from isd_repro.data.prepared import Split
from isd_repro.data.store import Store, StoreWriter
from isd_repro.interfaces import Batch
from isd_repro.runtime.errors import ConfigError

IMAGES, TRAIN, BATCH, SIDE = 30, 23, 5, 6  # 4 steps an epoch and 3 images left over
CPU = torch.device("cpu")
DATA = Data(
    subset="toy",
    image_size=SIDE,
    mean=(0.4,),
    std=(0.2,),
    view_student=View(crop_min=0.3, jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.0, hue=0.0, p=0.8)),
    view_teacher=View(crop_min=0.9),
)
WHOLE = DATA.model_copy(update={"view_student": View(crop_min=1.0, flip=0.0), "view_teacher": View(crop_min=1.0, flip=0.0)})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    pixels = torch.randint(256, (IMAGES, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with StoreWriter(tmp_path, Packing(channels=1)) as writer:
        for image in pixels:
            writer.append(image.numpy())
        info = writer.finish()
    return Store(tmp_path, info)


def make(store: Store, seed: int = 0, data: Data = DATA) -> Batches:
    """Training images are positions 7 to 29, labelled by their position."""
    index = torch.arange(IMAGES - TRAIN, IMAGES)
    return Batches(store, Split(index, index % 4), data, BATCH, seed, CPU)


def tensors(batch: Batch) -> list[Tensor]:
    return [batch.view_student, batch.view_teacher, batch.index, batch.label, batch.shuffle]


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_the_order_of_access_changes_nothing(store: Store) -> None:
    forward = [make(store).at(step) for step in range(10)]
    torch.manual_seed(123)
    batches = make(store)
    for step in (9, 3, 0, 7, 3, 8, 1):
        assert same(batches.at(step), forward[step]), step
        assert same(make(store).at(step), forward[step]), step


def test_steps_and_seeds_differ(store: Store) -> None:
    batches = make(store)
    views = [batches.at(step).view_student for step in range(10)]
    assert all(not torch.equal(views[i], views[j]) for i in range(10) for j in range(i))
    other = make(store, seed=1)
    for step in range(10):
        assert not torch.equal(batches.at(step).index, other.at(step).index), step
        assert not torch.equal(views[step], other.at(step).view_student), step
    assert len({tuple(batches.at(step).shuffle.tolist()) for step in range(10)}) > 5


def test_an_epoch_shows_no_image_twice_and_epochs_leave_out_different_ones(store: Store) -> None:
    batches = make(store)
    assert batches.steps_per_epoch == TRAIN // BATCH
    orders = [torch.cat([batches.at(4 * epoch + step).index for step in range(4)]).tolist() for epoch in range(6)]
    for order in orders:
        assert len(set(order)) == len(order) == 20
        assert set(order) <= set(range(TRAIN))
    assert len({tuple(order) for order in orders}) == 6
    assert set().union(*orders) == set(range(TRAIN))


def test_a_batch_that_is_the_whole_split_covers_it(store: Store) -> None:
    index = torch.arange(IMAGES)
    batches = Batches(store, Split(index, index), DATA, IMAGES, 0, CPU)
    assert batches.steps_per_epoch == 1
    assert sorted(batches.at(3).index.tolist()) == list(range(IMAGES))


def test_views_are_of_the_images_that_the_batch_names(store: Store) -> None:
    """With views that change nothing, both are the normalised pixels themselves."""
    batches = make(store, data=WHOLE)
    for step in (0, 5):
        batch = batches.at(step)
        pixels, _ = store.read(batch.index + IMAGES - TRAIN)
        want = (pixels.float() / 255 - 0.4) / 0.2
        for view in (batch.view_student, batch.view_teacher):
            torch.testing.assert_close(view, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(batch.label, (batch.index + IMAGES - TRAIN) % 4)
        assert sorted(batch.shuffle.tolist()) == list(range(BATCH))


def test_the_two_views_are_drawn_apart(store: Store) -> None:
    data = DATA.model_copy(update={"view_teacher": DATA.view_student})
    batch = make(store, data=data).at(0)
    assert (batch.view_student != batch.view_teacher).flatten(1).any(1).all()


def test_each_view_follows_its_own_law(store: Store) -> None:
    """The student's is the whole image, the teacher's is not."""
    data = WHOLE.model_copy(update={"view_teacher": View(crop_min=0.2, crop_max=0.3)})
    batch, plain = make(store, data=data).at(0), make(store, data=WHOLE).at(0)
    assert torch.equal(batch.view_student, plain.view_student)
    assert not torch.equal(batch.view_teacher, plain.view_teacher)


def test_generators_of_different_keys_differ() -> None:
    keys = [(0, "epoch", 1), (0, "step", 1), (1, "step", 0), (0, "step", 11), (10, "step", 1), (1, "step", 1)]
    draws = {key: int(torch.randint(2**62, (1,), generator=generator_of(*key))) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert draws[keys[0]] == int(torch.randint(2**62, (1,), generator=generator_of(*keys[0])))


def test_a_split_smaller_than_a_batch_is_refused(store: Store) -> None:
    few = torch.arange(BATCH - 1)
    with pytest.raises(ConfigError, match=r"optim\.batch_size: 5, but subset 'toy' has only 4 images"):
        Batches(store, Split(few, few), DATA, BATCH, 0, CPU)
