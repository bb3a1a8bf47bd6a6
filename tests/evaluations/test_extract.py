"""Features: the same bits whatever is asked together, encoders left as they were, files that are what they claim."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import transforms as v1

from isd_repro.data import eval_loader
from isd_repro.data.augment import centre
from isd_repro.data.eval_loader import Frame, centred
from isd_repro.evaluations.arithmetic import exact
from isd_repro.evaluations.features import BLOCK, Features, features, load_features, save_features
from isd_repro.runtime.errors import DataError
from isd_repro.tensor_files import save_tensors

CPU = torch.device("cpu")


def network(seed: int) -> nn.Sequential:
    """Convolutions, BatchNorm with statistics of its own, and dropout: everything that eval mode matters to."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        for _ in range(3):
            net(torch.randn(8, 3, 6, 6) * 2 + 1)
    return net


def state_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def pictures() -> Tensor:
    return torch.randn(2 * BLOCK + 37, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_equals_a_plain_forward_in_eval_mode(pictures: Tensor) -> None:
    net = network(1)
    found = features({"student": net}, lambda at: pictures[at], len(pictures), CPU)["student"]
    conv, norm = net[0], net[1]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    hidden = nn.functional.conv2d(
        pictures.double(), conv.weight.double(), conv.bias.double() if conv.bias is not None else None, padding=1
    )
    shape = (1, -1, 1, 1)
    hidden = (hidden - norm.running_mean.double().view(shape)) / (norm.running_var.double().view(shape) + norm.eps).sqrt()
    quarters = hidden.clamp_min(0).unflatten(2, (2, 3)).unflatten(4, (2, 3)).mean(dim=(3, 5))  # no dropout
    assert torch.allclose(found.double(), quarters.flatten(1), atol=1e-6)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("count", [1, 7, BLOCK, BLOCK + 1])
def test_bits_do_not_depend_on_how_many_are_asked(pictures: Tensor, count: int) -> None:
    net = network(2)
    whole = features({"student": net}, lambda at: pictures[at], len(pictures), CPU)["student"]
    part = features({"student": net}, lambda at: pictures[:count][at], count, CPU)["student"]
    assert torch.equal(part, whole[:count])


def test_reads_every_image_once(pictures: Tensor) -> None:
    asked: list[Tensor] = []
    done: list[int] = []

    def images(position: Tensor) -> Tensor:
        asked.append(position)
        return pictures[position]

    features({"student": network(1), "teacher": network(2)}, images, len(pictures), CPU, done.append)
    assert [len(position) for position in asked] == [BLOCK] * 3 + [5]
    assert torch.equal(torch.cat(asked), torch.arange(len(pictures)))
    assert done == [BLOCK] * 3 + [5]


@pytest.mark.parametrize(("side", "group"), [(40, 32), (64, 16), (128, 4), (224, 1)])
def test_no_more_images_pass_forward_than_one_group_needs(side: int, group: int) -> None:
    passed: list[int] = []
    net = nn.Flatten()
    net.register_forward_hook(lambda _, given, __: passed.append(len(given[0])))
    features({"student": net}, lambda at: torch.zeros(len(at), 1, side, side), 41, CPU)
    assert passed == [group] * -(-41 // group)


class Sized:
    """Images of different sizes, padded to the largest that is read with them, as readers do."""

    channels = 3

    def __init__(self) -> None:
        self.sizes = torch.tensor([[20 + 3 * at, 40 - 2 * at] for at in range(9)])
        draw = torch.Generator().manual_seed(1)
        self._images = [torch.randint(0, 256, (3, *size), generator=draw, dtype=torch.uint8) for size in self.sizes.tolist()]

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self.sizes[index]
        batch = torch.zeros(len(index), 3, *sizes.amax(dim=0).tolist(), dtype=torch.uint8)
        for row, at in enumerate(index.tolist()):
            batch[row, :, : sizes[row, 0], : sizes[row, 1]] = self._images[at]
        return batch, sizes

    def ahead(self, index: Tensor) -> None:
        """Nothing to prepare."""


def test_an_images_bits_do_not_depend_on_the_sizes_of_its_neighbours() -> None:
    reader, frame = Sized(), Frame(16, 0.875, (0.5,) * 3, (0.25,) * 3)
    index = torch.arange(9)
    whole = centred(reader, index, frame, CPU)(index)
    for part in (index[:1], index[3:5], index.flip(0)[:4]):
        assert torch.equal(
            torch.cat([centred(reader, index, frame, CPU)(part[at : at + 1]) for at in range(len(part))]), whole[part]
        )
    few = torch.tensor([8, 2])  # a split of fewer images
    assert torch.equal(centred(reader, few, frame, CPU)(torch.arange(2)), whole[few])


def test_large_images_are_read_one_by_one_so_that_progress_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their views differ from those of others by rounding alone."""
    reader, steps, frame = Sized(), list[int](), Frame(16, 0.875, (0.5,) * 3, (0.25,) * 3)
    reader.sizes, reader._images = reader.sizes[:1].expand(9, 2), reader._images[:1] * 9
    views = []
    for least, expected in ((800, [1] * 9), (801, [9])):
        monkeypatch.setattr(eval_loader, "LARGE", least)
        steps.clear()
        views.append(centred(reader, torch.arange(9), frame, CPU, steps.append)(torch.arange(9)))
        assert steps == expected
    assert torch.allclose(views[0], views[1], atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(300, 200), (200, 301), (128, 128), (97, 333)])
def test_the_view_of_a_large_image_is_torchvisions(height: int, width: int) -> None:
    pixels = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    found = eval_loader._centre_large(pixels, Frame(64, 0.875, (0.0,), (1.0,)))
    resized = v1.functional.resize(pixels.double() / 255, [73], antialias=True)
    assert torch.allclose(found.double(), v1.functional.center_crop(resized, [64, 64]), atol=1e-5)


@pytest.mark.parametrize("size", [20, 60])
def test_the_view_is_the_released_one_but_for_rounding_to_eight_bits(size: int) -> None:
    """Resize and CenterCrop on an 8-bit image, which round twice: DEV-28."""
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (1, 3, 40, 52), generator=draw, dtype=torch.uint8)
    short = round(size / 0.875)
    released = v1.Compose([v1.ToPILImage(), v1.Resize(short), v1.CenterCrop(size), v1.ToTensor()])(pixels[0])
    found = centre(pixels, torch.tensor([[40, 52]]), size, 0.875)[0]
    levels = (found - released).abs() * 255
    assert 0.1 < float(levels.mean()) < 0.4
    assert float(levels.max()) < 1.5


def test_encoder_bytes_are_unchanged_and_each_encoder_has_its_own_features(pictures: Tensor) -> None:
    nets = {"student": network(1).train(), "teacher": network(2).train()}
    before = {name: state_hash(net) for name, net in nets.items()}
    both = features(nets, lambda at: pictures[at], 20, CPU)
    assert {name: state_hash(net) for name, net in nets.items()} == before
    assert all(parameter.grad is None for net in nets.values() for parameter in net.parameters())
    alone = features({"teacher": network(2)}, lambda at: pictures[at], 20, CPU)
    assert torch.equal(both["teacher"], alone["teacher"])
    assert not torch.equal(both["teacher"], both["student"])


def test_autocast_around_changes_nothing(pictures: Tensor) -> None:
    net = network(3)
    plain = features({"student": net}, lambda at: pictures[at], 9, CPU)["student"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(pictures[:9]).dtype == torch.bfloat16  # it would
        cast = features({"student": net}, lambda at: pictures[at], 9, CPU)["student"]
    assert torch.equal(plain, cast)


def settings_now() -> tuple[str, bool, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark


def test_exact_gives_the_callers_settings_back() -> None:
    before = settings_now()
    inside: list[tuple[str, bool, bool]] = []

    def fail() -> None:
        with exact(CPU):
            inside.append(settings_now())
            raise ZeroDivisionError

    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ZeroDivisionError):
            fail()
        assert inside == [("highest", True, False)]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert settings_now() == before


def test_features_that_are_not_finite_are_refused(pictures: Tensor) -> None:
    pictures[3] = torch.inf
    with pytest.raises(DataError, match="'student': 1 of 5 rows are not finite"):
        features({"student": nn.Flatten()}, lambda at: pictures[at], 5, CPU)
    with pytest.raises(DataError, match="no images"):
        features({"student": nn.Flatten()}, lambda at: pictures[at], 0, CPU)


@pytest.fixture
def kept() -> Features:
    draw = torch.Generator().manual_seed(0)
    return Features(
        search={"student": torch.randn(4, 3, generator=draw), "teacher": torch.randn(4, 3, generator=draw)},
        query={"student": torch.randn(2, 3, generator=draw), "teacher": torch.randn(2, 3, generator=draw)},
        search_label=torch.tensor([0, 1, 1, 0]),
        query_label=torch.tensor([1, 0]),
        identity={
            "run": "isd",
            "encoder_sha256": "a" * 64,
            "manifest": "m",
            "encoders": ["student", "teacher"],
            "image_size": 6,
            "normalised": False,
        },
    )


def test_file_round_trip(tmp_path: Path, kept: Features) -> None:
    path = tmp_path / "features.safetensors"
    save_features(path, kept)
    first = path.read_bytes()
    back = load_features(path, "a" * 64)
    for ours, theirs in ((kept.search, back.search), (kept.query, back.query)):
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(back.search_label, kept.search_label)
    assert torch.equal(back.query_label, kept.query_label)
    assert back.identity["manifest"] == "m"
    save_features(path, kept)
    assert path.read_bytes() == first


def test_file_of_another_encoder_is_refused(tmp_path: Path, kept: Features) -> None:
    path = tmp_path / "features.safetensors"
    save_features(path, kept)
    with pytest.raises(DataError, match=r"made by encoder file aaaaaaaaaaaa, but the run's encoder file is bbbbbbbbbbbb"):
        load_features(path, "b" * 64)


def test_file_whose_parts_do_not_fit_is_refused(tmp_path: Path, kept: Features) -> None:
    path = tmp_path / "features.safetensors"
    save_features(path, replace(kept, query_label=torch.tensor([1, 0, 1])))
    with pytest.raises(DataError, match=r"2 rows in student\.query, but 3 in query\.label"):
        load_features(path, "a" * 64)
    save_tensors(path, "features", {"student.search": kept.search["student"]}, kept.identity)
    with pytest.raises(DataError, match=r"expected tensors .*teacher\.query"):
        load_features(path, "a" * 64)
