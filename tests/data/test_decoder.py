"""JPEGs decoded by a device: which rule and which package decide, what the trial accepts, and what a feed does after it."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from isd_repro.config.params import Data, Numerics, View
from isd_repro.config.params import Store as Packing
from isd_repro.data import feed
from isd_repro.data.feed import Decoder
from isd_repro.data.loader import Batches
from isd_repro.data.prepared import Split
from isd_repro.data.store import Store, StoreWriter, convert
from isd_repro.runtime import ranks
from isd_repro.runtime.errors import DataError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FAST = Numerics(engine="fast")
IMAGES, BATCH = 14, 4
DATA = Data(subset="toy", image_size=24, view_student=View(crop_min=0.2), view_teacher=View(crop_min=0.2))
NAME = "nvJPEG of a test"
Decode = Callable[[list[Tensor], int, torch.device], list[Tensor]]


def make(folder: Path, channels: int = 3, quality: int | None = 90) -> Store:
    settings = Packing.model_validate({"resize": "short-side", "size": 32, "channels": channels, "jpeg_quality": quality})
    draws = np.random.default_rng(0)
    with StoreWriter(folder, settings) as writer:
        for number in range(IMAGES):
            size = (45 + number, 36) if number % 3 else (36, 40 + number)
            image = Image.fromarray(draws.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
            writer.append(convert(image, settings))
        return Store(folder, writer.finish(), 1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make(tmp_path)


@pytest.fixture(autouse=True)
def _choice_is_made_anew() -> Iterator[None]:
    feed.decoder.cache_clear()
    yield
    feed.decoder.cache_clear()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Decode], None]:
    """Makes this the decoder, and the rule as if there were a CUDA device."""

    def put(decode: Decode) -> None:
        rule = feed.decodes_there
        monkeypatch.setattr(feed, "decoder", lambda: Decoder(NAME, decode))
        monkeypatch.setattr(feed, "decodes_there", lambda device, numerics, store: rule(CUDA, numerics, store))

    return put


# --- decoders -------------------------------------------------------------------------------------------------------------


def pillow(files: list[Tensor], channels: int, device: torch.device) -> list[Tensor]:
    found = [np.asarray(Image.open(io.BytesIO(file.numpy().tobytes()))) for file in files]
    return [torch.from_numpy(image.copy()).reshape(*image.shape[:2], channels).permute(2, 0, 1) for image in found]


def darker(files: list[Tensor], channels: int, device: torch.device) -> list[Tensor]:
    return [image - image.clamp(max=3) for image in pillow(files, channels, device)]


def coarse(files: list[Tensor], channels: int, device: torch.device) -> list[Tensor]:
    """With every 2 x 2 pixels of one chroma, as a decoder of 4:2:0 that repeats and does not interpolate."""
    found = []
    for image in pillow(files, channels, device):
        ycc = torch.from_numpy(np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("YCbCr")).copy()).float()
        height, width = ycc.shape[:2]
        chroma = torch.nn.functional.avg_pool2d(ycc[..., 1:].permute(2, 0, 1), 2, ceil_mode=True)
        ycc[..., 1:] = chroma.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width].permute(1, 2, 0)
        back = np.asarray(Image.fromarray(ycc.round().byte().numpy(), "YCbCr").convert("RGB"))
        found.append(torch.from_numpy(back.copy()).permute(2, 0, 1))
    return found


def raising(error: Exception) -> Decode:
    def decode(files: list[Tensor], channels: int, device: torch.device) -> list[Tensor]:
        raise error

    return decode


def changed(change: Callable[[list[Tensor]], list[Tensor]]) -> Decode:
    return lambda files, channels, device: change(pillow(files, channels, device))


# --- the rule and the package ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("numerics", [Numerics(), FAST, Numerics(engine="fast", precision="bf16")])
@pytest.mark.parametrize("quality", [None, 90])
def test_the_rule(device: torch.device, numerics: Numerics, quality: int | None, tmp_path: Path) -> None:
    want = device is CUDA and numerics.engine == "fast" and quality is not None
    assert feed.decodes_there(device, numerics, make(tmp_path, quality=quality)) is want


def test_torchcodec_is_taken_where_it_has_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def decode_jpeg(source: list[Tensor], *, mode: str, device: torch.device) -> list[Tensor]:
        asked.append((source, mode, device))
        return source

    monkeypatch.setitem(sys.modules, "torchcodec", SimpleNamespace(__version__="9.9"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", SimpleNamespace(decode_jpeg=decode_jpeg))
    name, decode = feed.decoder()
    assert name == "nvJPEG of torchcodec 9.9"
    files = [torch.zeros(3, dtype=torch.uint8)]
    assert decode(files, 3, CUDA) is files
    assert decode(files, 1, CUDA) is files
    assert asked == [(files, "RGB", CUDA), (files, "GRAY", CUDA)]


@pytest.mark.parametrize("there", ["not installed", "before 0.16", "broken"])
def test_torchvision_is_taken_where_torchcodec_has_none(there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None if there == "not installed" else SimpleNamespace())
    if there == "broken":
        plain = importlib.import_module

        def load(name: str) -> object:
            if name.startswith("torchcodec"):
                raise RuntimeError("libraries that do not fit")
            return plain(name)

        monkeypatch.setattr(importlib, "import_module", load)
    assert feed.decoder().name.startswith("nvJPEG of torchvision 0.")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("package", ["torchvision", "torchcodec"])
def test_the_packages_are_called_as_they_want_to_be(
    package: str, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real ones, for want of a CUDA device on the CPU, through the same call."""
    if package == "torchcodec":
        pytest.importorskip("torchcodec.decoders", exc_type=ImportError)
    else:
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    store = make(tmp_path, channels)
    index = torch.tensor([3, 0, 7, 13])
    found, sizes = feed.decode_there(store, index, CPU)
    want, want_sizes = store.read(index)
    assert feed.decoder().name.startswith(f"nvJPEG of {package} ")
    assert found.shape == want.shape
    assert torch.equal(sizes, want_sizes)
    assert (found.int() - want.int()).abs().max() <= 2
    assert feed.try_there(store, index, CPU) == (feed.decoder().name, "")


# --- the trial ------------------------------------------------------------------------------------------------------------

RIGHT: dict[str, Decode] = {"the CPU's": pillow, "some levels away": darker, "chroma repeated": coarse}
WRONG: dict[str, tuple[Decode, str]] = {
    "raises": (raising(RuntimeError("no nvJPEG\nin this build")), "RuntimeError: no nvJPEG"),
    "raises anything": (raising(TypeError("no such mode")), "TypeError: no such mode"),
    "too few": (changed(lambda images: images[:-1]), "ValueError: zip"),
    "turned": (changed(lambda images: [image.transpose(1, 2) for image in images]), "ValueError: image 3 (counted from 0) shows"),
    "one channel": (changed(lambda images: [image[:1] for image in images]), "expected (3, "),
    "swapped colours": (changed(lambda images: [image.flip(0) for image in images]), "levels from the CPU's on average"),
    "mirrored": (changed(lambda images: [image.flip(2) for image in images]), "levels from the CPU's on average"),
    "black": (changed(lambda images: [image * 0 for image in images]), "levels from the CPU's on average"),
    "floats": (changed(lambda images: [image.float() / 255 for image in images]), "levels from the CPU's on average"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_the_trial_accepts(name: str, store: Store, use: Callable[[Decode], None]) -> None:
    use(RIGHT[name])
    index = torch.arange(IMAGES)
    assert feed.try_there(store, index, CPU) == (NAME, "")
    same = torch.equal(feed.decode_there(store, index, CPU)[0], store.read(index)[0])
    assert same == (name == "the CPU's")  # so that the others are really others


@pytest.mark.parametrize("name", WRONG)
def test_the_trial_refuses(name: str, store: Store, use: Callable[[Decode], None]) -> None:
    decode, why = WRONG[name]
    use(decode)
    found = feed.try_there(store, torch.tensor([3, 0, 7]), CPU)
    assert found[0] == NAME
    assert why in found[1]
    assert "\n" not in found[1]
    assert str(store.folder) not in found[1], "records are committed and name no folder of the machine"


def test_what_pads_an_image_hides_no_difference(tmp_path: Path, use: Callable[[Decode], None]) -> None:
    """One wide and one tall image fill a square of which most is zero on both sides."""
    settings = Packing(resize="short-side", size=8, jpeg_quality=90)
    with StoreWriter(tmp_path, settings) as writer:
        for shape in ((8, 200), (200, 8)):
            writer.append(np.full((3, *shape), 100, dtype=np.uint8))
        store = Store(tmp_path, writer.finish(), 1)
    use(changed(lambda images: [image + 20 for image in images]))
    assert feed.try_there(store, torch.arange(2), CPU)[1].startswith("its pixels are 20.0 levels")


def test_no_decoder_at_all_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.setitem(sys.modules, "torchvision.io", SimpleNamespace())
    assert feed.try_there(store, torch.arange(2), CPU) == ("nvJPEG", "UserError: this torchvision decodes no JPEGs")


def test_memory_and_a_damaged_pack_are_no_failure_of_the_decoder(store: Store, use: Callable[[Decode], None]) -> None:
    use(raising(torch.OutOfMemoryError("all of it is in use")))
    with pytest.raises(torch.OutOfMemoryError):
        feed.try_there(store, torch.arange(2), CPU)
    with pytest.raises(torch.OutOfMemoryError):
        feed.decode_there(store, torch.arange(2), CPU)
    use(pillow)
    content = bytearray(store.path.read_bytes())
    content[:40] = bytes(40)
    store.path.write_bytes(content)
    with pytest.raises(DataError, match=r"image 0 .* is damaged"):
        feed.try_there(store, torch.arange(2), CPU)


# --- batches --------------------------------------------------------------------------------------------------------------


def batches(store: Store) -> Batches:
    index = torch.arange(IMAGES)
    return Batches(store, Split(index, index), DATA, BATCH, 0, CPU)


def views(batches: Batches, steps: int = 4) -> list[Tensor]:
    return [batches.at(step).view_student for step in range(steps)]


def test_after_a_good_trial_every_batch_is_decoded_there(store: Store, use: Callable[[Decode], None]) -> None:
    use(darker)
    plain, ours = batches(store), batches(store)
    assert ours.choose_decoder(0, FAST) == f", JPEGs decoded by {NAME}"
    for one, other, part in zip(views(plain), views(ours), views(ours.part(0, 1)), strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0, atol=4 / 255 / min(DATA.std))
        assert torch.equal(other, part), "a rank's part is decoded as the whole"


def test_the_trial_is_made_with_the_images_of_the_step(store: Store, use: Callable[[Decode], None]) -> None:
    tried: list[list[bytes]] = []

    def noting(files: list[Tensor], channels: int, device: torch.device) -> list[Tensor]:
        tried.append([file.numpy().tobytes() for file in files])
        return pillow(files, channels, device)

    use(noting)
    ours = batches(store)
    ours.choose_decoder(2, FAST)
    trial = list(tried)
    assert trial == [[content.tobytes() for content in store.payloads(ours.at(2).index)]]


@pytest.mark.parametrize("why", ["raises", "turned", "black", "another rank"])
def test_after_a_bad_trial_every_batch_is_the_cpus(
    why: str, store: Store, use: Callable[[Decode], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(darker if why == "another rank" else WRONG[why][0])
    if why == "another rank":
        monkeypatch.setattr(ranks, "anywhere", lambda flag: True)
    ours = batches(store)
    words = ours.choose_decoder(0, FAST)
    assert words.startswith(f", JPEGs not decoded by {NAME} (")
    assert (why == "another rank") == words.endswith("(it failed on another rank)")
    use(raising(AssertionError("decoded there all the same")))
    assert all(map(torch.equal, views(ours), views(batches(store))))


def test_where_the_rule_says_no_nothing_is_tried(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "decoder", lambda: pytest.fail("asked for a decoder"))
    (tmp_path / "pixels").mkdir()
    for numerics, where in ((FAST, store), (Numerics(), store), (FAST, make(tmp_path / "pixels", quality=None))):
        ours = batches(where)
        assert ours.choose_decoder(0, numerics) == ""
        assert len(views(ours)) == 4


def test_a_decoder_that_fails_later_fails_the_step(store: Store, use: Callable[[Decode], None]) -> None:
    calls = 0

    def tiring(files: list[Tensor], channels: int, device: torch.device) -> list[Tensor]:
        nonlocal calls
        calls += 1
        if calls == 4:  # after the trial and the steps 0 and 1
            raise RuntimeError("a bad stream")
        return pillow(files, channels, device)

    use(tiring)
    ours = batches(store)
    assert feed.NOT_DECODED not in ours.choose_decoder(0, FAST)
    views(ours, 2)
    with pytest.raises(DataError, match="cannot be decoded on cpu: a bad stream"):
        ours.at(2)


# --- the real thing -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("package", ["torchvision", "torchcodec"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_cuda_device_decodes_nearly_the_same_pixels(
    package: str, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the trial and the second stream, several times over, so that memory is used again."""
    if package == "torchcodec":
        pytest.importorskip("torchcodec.decoders", exc_type=ImportError)
    else:
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    store = make(tmp_path, channels)
    index = torch.arange(IMAGES)
    data = DATA if channels == 3 else DATA.model_copy(update={"mean": (0.5,), "std": (0.2,)})
    ours = Batches(store, Split(index, index), data, BATCH, 0, CUDA)
    words = ours.choose_decoder(0, FAST)
    assert words.startswith(f", JPEGs decoded by nvJPEG of {package} ")
    want, first = store.read(index)[0].int(), feed.decode_there(store, index, CUDA)[0].cpu()
    assert (first.int() - want).abs().float().mean() < (feed.LEVELS if channels == 3 else 1)
    assert torch.equal(feed.decode_there(store, index, CUDA)[0].cpu(), first)
    source = feed.Feed(store, lambda step: index.roll(step)[:BATCH], CUDA, decode_on_device=True)
    for step in range(40):
        pixels, sizes = source.at(step)
        for row, position in enumerate(index.roll(step)[:BATCH].tolist()):
            height, width = sizes[row].tolist()
            assert torch.equal(pixels[row, :, :height, :width].cpu(), first[position, :, :height, :width])
    assert ours.at(0).view_student.device.type == "cuda"
