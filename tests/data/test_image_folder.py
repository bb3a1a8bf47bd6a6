"""Images straight from files: the manifest and the pixels that `prepare` would give, and what is refused."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params, View
from isd_repro.data import augment
from isd_repro.data import eval_loader as images
from isd_repro.data import image_folder as folder
from isd_repro.data.eval_loader import Frame, as_channels, centred, parts
from isd_repro.data.image_folder import open_folder, open_packed
from isd_repro.data.loader import generator_of
from isd_repro.data.prepare import prepare
from isd_repro.evaluations.linear import Config as Linear
from isd_repro.runtime.errors import DataError

CPU = torch.device("cpu")
FRAME = Frame(6, 0.75, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
GREY = Frame(6, 0.75, (0.4,), (0.2,))


def encode(mode: str, seed: int, width: int, height: int, form: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = {
        "L": lambda: Image.fromarray(pixels[..., 0]),
        "RGB": lambda: Image.fromarray(pixels[..., :3]),
        "RGBA": lambda: Image.fromarray(pixels, "RGBA"),
        "CMYK": lambda: Image.frombytes("CMYK", (width, height), pixels.tobytes()),
        "P": lambda: Image.fromarray(pixels[..., :3]).quantize(16),
    }[mode]()
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def write(root: Path, train: int = 5, val: int = 3) -> Path:
    """Two classes of images of every mode and of different sizes."""
    kinds = [("L", "PNG"), ("CMYK", "JPEG"), ("RGB", "JPEG"), ("P", "PNG"), ("L", "JPEG")]
    for split, count in (("train", train), ("val", val)):
        for position, cls in enumerate(("ant", "bee")):
            for number in range(count):
                mode, form = kinds[number % len(kinds)]
                seed = 100 * position + number + (1000 if split == "val" else 0)
                path = root / split / cls / f"{number}.{'png' if form == 'PNG' else 'jpg'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode(mode, seed, 7 + number, 9 - number, form))
    return root


def pack(root: Path, folder: Path, channels: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISD_FOLDER_ROOT", str(root))
    subset = {
        "source": {"name": "image-folder", "root_env": "ISD_FOLDER_ROOT", "dataset": "images"},
        "rule": {"name": "all"},
        "store": {"channels": channels},
    }
    profile = {"profile": "p", "report": {"title": "t", "caption": "c"}, "subsets": {"all": subset}, "runs": {}}
    layout = Layout(folder=folder, root=folder, profile="p")
    prepare("all", Params.model_validate(profile), layout, Console(file=io.StringIO()))
    return layout.prepared("all")


@pytest.mark.parametrize(("channels", "workers"), [(1, 1), (3, 3)])
def test_manifest_and_pixels_are_those_of_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int, workers: int
) -> None:
    root = write(tmp_path / "images")
    packed = open_packed(pack(root, tmp_path, channels, monkeypatch), channels)
    frame = FRAME if channels == 3 else GREY
    with open_folder(root, channels, workers=workers) as found:
        assert found.prepared.manifest.sha256 == packed.prepared.manifest.sha256
        assert found.pixels == packed.pixels
        assert torch.equal(found.reader.sizes, packed.reader.sizes)
        for name in ("search", "query"):
            index = found.prepared.split(name).index
            position = torch.arange(len(index) + 2).clamp_(max=len(index) - 1)
            ours, theirs = (centred(one.reader, index, frame, CPU)(position) for one in (found, packed))
            assert torch.equal(ours, theirs)
        settings = Linear(batch_size=4, protocol="test")
        split = found.prepared.split("search")
        for one, two in zip(
            images.augmented(found.reader, split, frame, settings, CPU)(1),
            images.augmented(packed.reader, split, frame, settings, CPU)(1),
            strict=True,
        ):
            assert torch.equal(one[0], two[0])
            assert torch.equal(one[1], two[1])


def test_stores_of_the_other_channels_are_converted_as_pil_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    grey = np.asarray(Image.fromarray(draw).convert("L")).copy()
    pixels = torch.from_numpy(draw).permute(2, 0, 1)[None]
    assert torch.equal(as_channels(pixels, 1)[0, 0], torch.from_numpy(grey))
    again = np.asarray(Image.fromarray(grey).convert("RGB")).copy()
    assert torch.equal(as_channels(torch.from_numpy(grey)[None, None], 3)[0], torch.from_numpy(again).permute(2, 0, 1))
    root = tmp_path / "images"
    for split in ("train", "val"):
        for cls in ("a", "b"):
            (root / split / cls).mkdir(parents=True)
            (root / split / cls / "0.png").write_bytes(encode("L", len(split + cls), 5, 6, "PNG"))
    packed = open_packed(pack(root, tmp_path, 1, monkeypatch), 3)
    with open_folder(root, 3) as found:
        assert torch.equal(found.reader.read(torch.arange(4))[0], packed.reader.read(torch.arange(4))[0])
        assert found.pixels != packed.pixels


def test_views_are_those_of_the_augmentation(tmp_path: Path) -> None:
    """`augmented` draws its windows before it reads; the law is the training view's."""
    root = write(tmp_path)
    settings = Linear(batch_size=4, seed=5, protocol="test")
    with open_folder(root, 3) as found:
        split = found.prepared.split("search")
        for step, (views, label) in enumerate(images.augmented(found.reader, split, FRAME, settings, CPU)(2)):
            chosen = images.order(len(split), settings, 2)[step]
            pixels, sizes = found.reader.read(split.index[chosen])
            law = View(crop_min=settings.crop_min, flip=settings.flip)
            expected = augment.view(pixels, sizes, law, FRAME.size, generator_of(5, "linear", 2, step))
            assert torch.equal(views, augment.normalise(expected, FRAME.mean, FRAME.std))
            assert torch.equal(label, split.label[chosen])


def test_a_batch_too_large_to_pad_is_worked_on_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = torch.tensor([[2, 3], [2, 3], [9, 9], [1, 1], [4, 4], [4, 4]])
    assert parts(sizes, 3) == [slice(0, 6)]
    monkeypatch.setattr(images, "PADDED", 3 * 2 * 16)
    cut = parts(sizes, 3)
    assert cut == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)]
    root = write(tmp_path)
    with open_folder(root, 3) as found:
        split = found.prepared.split("search")
        settings = Linear(batch_size=8, protocol="test")

        def all_of() -> list[Tensor]:
            views = [batch for batch, _ in images.augmented(found.reader, split, FRAME, settings, CPU)(0)]
            return [centred(found.reader, split.index, FRAME, CPU)(torch.arange(len(split))), *views]

        small = all_of()
        monkeypatch.setattr(images, "PADDED", 2**28)
        for one, two in zip(small, all_of(), strict=True):
            assert torch.allclose(one, two, atol=1e-5)


def test_a_list_names_classes_and_groups(tmp_path: Path) -> None:
    root = write(tmp_path / "images")
    listed = tmp_path / "D1.txt"
    body = [f"/train/ant/{image.name}" for image in sorted((root / "train/ant").iterdir())]
    listed.write_text(
        "class names : \nant\nbee\nTrain Images: \n" + "\n".join([*body, "/train/bee/0.png", "/train/bee/gone.png"]) + "\n"
    )
    for cls in ("ant", "bee", "cat"):
        (root / "val" / "cat").mkdir(exist_ok=True)
        (root / "train" / "cat").mkdir(exist_ok=True)
        for split in ("train", "val"):
            if cls == "cat":
                (root / split / "cat" / "0.png").write_bytes(encode("L", 3, 4, 4, "PNG"))
    with open_folder(root, 3, listed=listed) as found:
        manifest = found.prepared.manifest
        assert manifest.classes == ("ant", "bee")
        assert manifest.large == ("ant",)
        assert (len(manifest.train), len(manifest.search), len(manifest.query)) == (6, 10, 6)
        assert "1 of the 7 images of D1.txt are not among the images" in found.notes[0]
        groups = found.prepared.groups(found.prepared.split("query").label.numpy())
        assert {name: int(mask.sum()) for name, mask in groups.items()} == {"all": 6, "rare": 3, "large": 3}
    listed.write_text("class names : \nemu\nTrain Images: \n/train/emu/0.png\n")
    with (
        pytest.raises(DataError, match="1 of its 1 classes are not among the images, first emu"),
        open_folder(root, 3, listed=listed),
    ):
        pass
    with pytest.raises(DataError, match="no such list"), open_folder(root, 3, listed=tmp_path / "D2.txt"):
        pass


def test_a_list_of_labelled_files_names_classes_and_groups(tmp_path: Path) -> None:
    root = write(tmp_path / "images")
    listed = tmp_path / "lt.txt"
    listed.write_text("".join(f"train/ant/{path.name} 0\n" for path in sorted((root / "train/ant").iterdir())))
    with open_folder(root, 3, listed=listed) as found:
        manifest = found.prepared.manifest
        assert (manifest.classes, manifest.large) == (("ant",), ())
        assert (manifest.rule["name"], manifest.rule["path"]) == ("file", "lt.txt")
        assert (len(manifest.train), len(manifest.query)) == (5, 3)
        groups = found.prepared.groups(found.prepared.split("query").label.numpy())
        assert {name: int(mask.sum()) for name, mask in groups.items()} == {"all": 3, "few": 3}


def refused(root: Path, match: str) -> None:
    with pytest.raises(DataError, match=match), open_folder(root, 3) as found:
        found.reader.read(torch.arange(len(found.reader.sizes)))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder or zip")
    root = write(tmp_path / "images")
    (tmp_path / "text.zip").write_text("no zip")
    refused(tmp_path / "text.zip", "not a readable zip")
    path = root / "train" / "ant" / "2.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])  # inside its pixels
    refused(root, r"train/ant/2\.jpg: cannot be decoded")
    path.write_bytes(b"text")
    refused(root, r"1 of 16 images cannot be read; first train/ant/2\.jpg")
    path.write_bytes(whole)


@pytest.mark.parametrize(("width", "height"), [(3, 3), (7, 9)], ids=["another size", "the same size"])
def test_a_file_that_changes_is_noticed(width: int, height: int, tmp_path: Path) -> None:
    root = write(tmp_path)
    path = root / "train" / "ant" / "0.png"
    before = path.read_bytes()
    with open_folder(root, 3) as found:
        path.write_bytes(encode("L", 77, width, height, "PNG"))
        with pytest.raises(DataError, match=r"train/ant/0\.png: changed while it was being read"):
            found.reader.read(torch.arange(3))
        path.write_bytes(before)
        assert found.reader.read(torch.arange(1))[1].tolist() == [[9, 7]]


def test_what_is_read_ahead_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path)
    decoded: list[int] = []
    decode = folder.FileReader._decode

    def counted(self: folder.FileReader, at: int) -> npt.NDArray[np.uint8]:
        decoded.append(at)
        return decode(self, at)

    monkeypatch.setattr(folder.FileReader, "_decode", counted)
    with open_folder(root, 3, workers=1) as found:
        bytes_of = (3 * found.reader.sizes.prod(dim=1)).tolist()
        monkeypatch.setattr(folder, "PADDED", bytes_of[4] + bytes_of[5] + bytes_of[6] - 1)
        found.reader.ahead(torch.tensor([4, 5, 6, 7]))
        found.reader.read(torch.tensor([0, 1]))  # more than the bound allows ahead is read where it is asked for
        assert sorted(decoded) == [0, 1, 4, 5]
        found.reader.ahead(torch.tensor([5, 8]))
        found.reader.read(torch.tensor([4, 5, 8]))  # 4 was let go, 5 was kept
        assert sorted(decoded) == [0, 1, 4, 4, 5, 8]


@pytest.mark.parametrize("zipped", [False, True])
def test_what_is_passed_over_is_counted(zipped: bool, tmp_path: Path) -> None:
    root = write(tmp_path / "images")
    more = {
        "train/ant/0.gif": 3, "train/ant/1.gif": 1, "val/bee/2.JP2": 1, "train/bee/.hidden": 1, "train/loose.png": 1,
        "val/ant/more/x.txt": 1, "train/bee/LICENSE": 1,
    }  # fmt: skip
    for name in more:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    path = root
    if zipped:
        path = Path(shutil.make_archive(str(tmp_path / "x"), "zip", root))
    with open_folder(path, 3) as found:
        assert len(found.prepared.manifest.images) == 16
        (note,) = found.notes
    counts = {".gif 2", ".jp2 1", ".png 1", "folders 1", "others 1"}
    total, _, shown = note.partition(" files or folders under train and val were ignored: ")
    assert set(shown.split(", ")) == counts
    assert int(total) == 6
