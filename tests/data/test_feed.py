"""The feed: what a step gets depends on the step alone, two batches exist at a time, and crops follow torchvision's law."""

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

from isd_repro.config.params import Data, Jitter, View
from isd_repro.config.params import Store as Packing
from isd_repro.data import augment
from isd_repro.data.feed import Feed
from isd_repro.data.loader import Batches, generator_of
from isd_repro.data.prepared import Split
from isd_repro.data.store import Store, StoreWriter, convert
from isd_repro.interfaces import Batch
from isd_repro.runtime.errors import DataError

CPU = torch.device("cpu")
IMAGES, BATCH, SIDE = 26, 4, 24
SETTINGS = Packing(resize="short-side", size=32, jpeg_quality=90)
STRONG = View(crop_min=0.2, jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8), grayscale=0.2)
DATA = Data(subset="toy", image_size=SIDE, view_student=STRONG, view_teacher=View(crop_min=0.2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path)
    return tmp_path


def make(folder: Path) -> Store:
    draws = np.random.default_rng(0)
    with StoreWriter(folder, SETTINGS) as writer:
        for number in range(IMAGES):
            size = (45 + number, 36) if number % 3 else (36, 40 + number)
            image = Image.fromarray(draws.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
            writer.append(convert(image, SETTINGS))
        return Store(folder, writer.finish(), 1)


def batches(folder: Path, workers: int = 1) -> Batches:
    store = make(folder)
    index = torch.arange(IMAGES)
    return Batches(Store(folder, store.info, workers), Split(index, index), DATA, BATCH, 0, CPU)


def tensors(batch: Batch) -> list[Tensor]:
    return [batch.view_student, batch.view_teacher, batch.index, batch.label, batch.shuffle]


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
    data = DATA.model_copy(update={"view_student": law, "view_teacher": law})
    store = make(folder)
    index = torch.arange(IMAGES)
    source = Batches(store, Split(index, index), data, BATCH, 3, CPU)
    for step in range(source.steps_per_epoch):
        batch = source.at(step)
        draws = generator_of(3, "step", step)
        for view in (batch.view_student, batch.view_teacher):
            crop = augment.draw_crop(store.sizes[batch.index], law, draws)
            for row, position in enumerate(batch.index.tolist()):
                content = store.payloads(torch.tensor([position]))[0].tobytes()
                (folder / "one.jpg").write_bytes(content)
                pixels = torch.from_numpy(np.asarray(Image.open(folder / "one.jpg")).copy()).permute(2, 0, 1).float() / 255
                assert min(pixels.shape[1:]) == 32
                window = [int(side[row]) for side in (crop.top, crop.left, crop.height, crop.width)]
                want = F.resized_crop(pixels, *window, [SIDE, SIDE], antialias=True)
                want = F.horizontal_flip(want) if crop.flip[row] else want
                want = F.normalize(want, list(DATA.mean), list(DATA.std))
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
    feed = Feed(store, lambda step: torch.tensor([step]), CPU)
    for step in range(8):
        pixels, _ = feed.at(step)
        assert pixels.tolist() == [step]
        del pixels
    gc.collect()
    assert store.asked[:8] == list(range(8)), "nothing is read twice"
    assert store.most <= 2


def test_a_damaged_image_fails_the_step_that_needs_it() -> None:
    store: Any = Counting()
    feed = Feed(store, lambda step: torch.tensor([step]), CPU)
    assert feed.at(12)[0].tolist() == [12]
    with pytest.raises(DataError, match="13 is damaged"):
        feed.at(13)
    assert feed.at(14)[0].tolist() == [14]


@pytest.mark.gpu
def test_a_cuda_device_gets_the_same_pixels(folder: Path) -> None:
    store = make(folder)
    device = torch.device("cuda")
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))[:24].view(6, 4)
    feed = Feed(store, lambda step: order[step % 6], device)
    for step in range(6):
        pixels, sizes = feed.at(step)
        want, want_sizes = store.read(order[step])
        assert pixels.device.type == "cuda"
        assert torch.equal(pixels.cpu(), want)
        assert torch.equal(sizes, want_sizes)
