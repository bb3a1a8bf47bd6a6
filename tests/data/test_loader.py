"""Batches are a pure function of the seed and the step."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from isd_repro.config.params import Data, Jitter, StoreSettings, View
from isd_repro.data import augment
from isd_repro.data.loader import Batches, Prefetch, generator_of
from isd_repro.data.manifests import Split
from isd_repro.data.store import Store, convert
from isd_repro.interfaces import Batch
from isd_repro.runtime.errors import ConfigError, DataError
from tests.data import trees

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
    return Store(tmp_path, trees.packed(tmp_path, pixels.numpy(), StoreSettings(channels=1)))


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


def test_more_views_show_the_same_images_and_change_nothing_else(store: Store) -> None:
    whole = View(crop_min=1.0, flip=0.0)
    data = DATA.model_copy(update={"views_more": (whole, DATA.view_student, DATA.view_student)})
    for step in range(5):
        batch = make(store, data=data).at(step)
        assert same(batch, make(store).at(step))
        assert torch.equal(batch.more[0], make(store, data=WHOLE).at(step).view_student)
        assert not torch.equal(batch.more[1], batch.more[2])
    assert make(store).at(0).more == ()
    assert "views_more" not in DATA.model_dump()  # so fingerprints of earlier runs stay what they are


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
    assert {batches.at(step).view_teacher.shape for step in range(8)} == {(BATCH, 1, SIDE, SIDE)}  # compiled code sees one shape
    orders = [torch.cat([batches.at(4 * epoch + step).index for step in range(4)]).tolist() for epoch in range(6)]
    for order in orders:
        assert len(set(order)) == len(order) == 20
        assert set(order) <= set(range(TRAIN))
    assert len({tuple(order) for order in orders}) == 6
    assert set().union(*orders) == set(range(TRAIN))


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


def test_each_view_follows_its_own_law(store: Store) -> None:
    """The student's is the whole image, the teacher's is not."""
    data = WHOLE.model_copy(update={"view_teacher": View(crop_min=0.2, crop_max=0.3)})
    batch, plain = make(store, data=data).at(0), make(store, data=WHOLE).at(0)
    assert torch.equal(batch.view_student, plain.view_student)
    assert not torch.equal(batch.view_teacher, plain.view_teacher)


def test_a_split_smaller_than_a_batch_is_refused(store: Store) -> None:
    few = torch.arange(BATCH - 1)
    with pytest.raises(ConfigError, match=r"optim\.batch_size: 5, but subset 'toy' has only 4 images"):
        Batches(store, Split(few, few), DATA, BATCH, 0, CPU)


# --- JPEGs, read ahead ---

PHOTOS = 26
SETTINGS = StoreSettings(resize="short-side", side=32, jpeg_quality=90)
STRONG = View(crop_min=0.2, jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8), grayscale=0.2)
COLOUR = Data(subset="toy", image_size=24, view_student=STRONG, view_teacher=View(crop_min=0.2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_jpegs(tmp_path)
    return tmp_path


def make_jpegs(folder: Path) -> Store:
    draws = np.random.default_rng(0)
    images = []
    for number in range(PHOTOS):
        size = (45 + number, 36) if number % 3 else (36, 40 + number)
        image = Image.fromarray(draws.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        images.append(convert(image, SETTINGS))
    return Store(folder, trees.packed(folder, images, SETTINGS), 1)


def batches(folder: Path, workers: int = 1) -> Batches:
    store = make_jpegs(folder)
    index = torch.arange(PHOTOS)
    return Batches(Store(folder, store.info, workers), Split(index, index), COLOUR, 4, 0, CPU)


def test_batches_are_bit_equal_for_any_workers_any_order_and_on_resume(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    one = batches(tmp_path / "a")
    steps = 2 * one.steps_per_epoch
    forward = [tensors(one.at(step)) for step in range(steps)]
    many = batches(tmp_path / "b", workers=5)
    resumed = batches(tmp_path / "c", workers=3)
    for step in range(steps):
        assert all(map(torch.equal, tensors(many.at(step)), forward[step])), step
    for step in (7, 8, 2, 2, 11, 0):  # where a resumed run begins, and steps that were not read ahead
        assert all(map(torch.equal, tensors(resumed.at(step)), forward[step])), step


def test_a_crop_is_torchvisions_of_the_decoded_image(folder: Path) -> None:
    """The whole of a batch's views, by torchvision, one image at a time, from Pillow's own decoding of what the store keeps."""
    law = View(crop_min=0.2, flip=0.5)
    data = COLOUR.model_copy(update={"view_student": law, "view_teacher": law})
    store = make_jpegs(folder)
    index = torch.arange(PHOTOS)
    source = Batches(store, Split(index, index), data, 4, 3, CPU)
    for step in range(source.steps_per_epoch):
        batch = source.at(step)
        draws = generator_of(3, "step", step)
        for view in (batch.view_student, batch.view_teacher):
            crop = augment.draw_crop(store.sizes[batch.index], law, draws)
            for row, position in enumerate(batch.index.tolist()):
                height, width = store.sizes[position].tolist()
                pixels = store.read(torch.tensor([position]))[0][0, :, :height, :width].float() / 255
                assert min(pixels.shape[1:]) == 32
                window = [int(side[row]) for side in (crop.top, crop.left, crop.height, crop.width)]
                want = F.resized_crop(pixels, *window, [24, 24], antialias=True)
                want = F.horizontal_flip(want) if crop.flip[row] else want
                want = F.normalize(want, list(COLOUR.mean), list(COLOUR.std))
                torch.testing.assert_close(view[row], want, rtol=0, atol=5e-5)


class Counting:
    """A store that knows how many of its batches exist at once, and what it was asked for."""

    keeps_jpegs = True

    def __init__(self) -> None:
        self.alive = self.most = 0
        self.asked: list[int] = []
        self.lock = threading.Lock()

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        with self.lock:
            self.alive += 1
            self.most = max(self.most, self.alive)
            self.asked.append(int(index[0]))
        if index[0] == 13:
            raise DataError("image 13 is damaged")
        batch = index.clone()
        weakref.finalize(batch, self.gone)
        return batch, index

    def gone(self) -> None:
        with self.lock:
            self.alive -= 1


def test_one_batch_is_in_use_and_one_ahead_and_no_more() -> None:
    store: Any = Counting()
    prefetch = Prefetch(store, lambda step: torch.tensor([step]), CPU)
    for step in range(8):
        pixels, _ = prefetch.at(step)
        assert pixels.tolist() == [step]
        del pixels
    gc.collect()
    assert store.asked[:8] == list(range(8)), "nothing is read twice"
    assert store.most <= 2


def test_a_damaged_image_fails_the_step_that_needs_it() -> None:
    store: Any = Counting()
    prefetch = Prefetch(store, lambda step: torch.tensor([step]), CPU)
    assert prefetch.at(12)[0].tolist() == [12]
    with pytest.raises(DataError, match="13 is damaged"):
        prefetch.at(13)
    assert prefetch.at(14)[0].tolist() == [14]


@pytest.mark.gpu
def test_a_cuda_device_gets_the_same_pixels(folder: Path) -> None:
    store = make_jpegs(folder)
    device = torch.device("cuda")
    order = torch.randperm(PHOTOS, generator=torch.Generator().manual_seed(0))[:24].view(6, 4)
    prefetch = Prefetch(store, lambda step: order[step % 6], device)
    for step in range(6):
        pixels, sizes = prefetch.at(step)
        want, want_sizes = store.read(order[step])
        assert pixels.device.type == "cuda"
        assert torch.equal(pixels.cpu(), want)
        assert torch.equal(sizes, want_sizes)
