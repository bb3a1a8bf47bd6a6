"""Images of a target data set on their way to an encoder, each decoded once and one block ahead.

The view is the evaluation's, made of one image at a time: sizes differ too much to pad a block. What has been read is
remembered as label and as sha256 of the converted pixels, so that the set's identity comes from the pass that extracts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from isd_repro.config.params import Store, TransferName
from isd_repro.data import augment
from isd_repro.data.images import Frame
from isd_repro.data.store import convert
from isd_repro.data.transfer_sets import Division, Opened
from isd_repro.records import ManifestIdentity
from isd_repro.runtime.errors import DataError

_Read = tuple[Tensor, int, str]  # view, label, sha256


class TransferImages:
    """Positions in the set's own order -> normalised views, B x C x S x S; `label` and `digest` hold what has been read."""

    def __init__(self, opened: Opened, frame: Frame, channels: int, pool: ThreadPoolExecutor) -> None:
        count = len(opened.part)
        self.label = torch.full((count,), -1, dtype=torch.int64)
        self.digest = [""] * count
        self._opened, self._frame, self._pool = opened, frame, pool
        self._store = Store.model_validate({"channels": channels})
        self._waiting: dict[int, Future[_Read]] = {}

    def __len__(self) -> int:
        return len(self.digest)

    def __call__(self, position: Tensor) -> Tensor:
        """Views of the images at these positions, on the CPU."""
        wanted = position.tolist()
        self._ask(wanted)
        found = {at: self._waiting.pop(at) for at in dict.fromkeys(wanted)}
        self._ask(at for at in range(wanted[-1] + 1, min(wanted[-1] + 1 + len(wanted), len(self))))
        for at, future in found.items():
            _, self.label[at], self.digest[at] = future.result()
        views = torch.stack([found[at].result()[0] for at in wanted])
        return augment.normalise(views, self._frame.mean, self._frame.std)

    def _ask(self, positions: Iterable[int]) -> None:
        for at in positions:
            if at not in self._waiting:
                self._waiting[at] = self._pool.submit(self._read, at)

    def _read(self, at: int) -> _Read:
        spec = self._opened.spec
        where = f"{spec.title}: image {at} (counted from 0, {self._opened.part[at]} part)"
        try:
            image, label = self._opened.get(at)
            pixels = torch.from_numpy(convert(image, self._store).copy())
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{where} cannot be read: {error}", f"mend the folder that {spec.root_env} names") from error
        if not 0 <= label < len(self._opened.classes):
            found = f"{where} has class number {label}, the set has {len(self._opened.classes)} classes"
            raise DataError(found, f"mend the annotations in the folder that {spec.root_env} names")
        digest = hashlib.sha256(f"{tuple(pixels.shape)}\n".encode() + pixels.numpy().tobytes()).hexdigest()
        size = torch.tensor([pixels.shape[1:]])
        return augment.centre(pixels[None], size, self._frame.size, self._frame.crop_ratio)[0], label, digest


def identity(name: TransferName, images: TransferImages, opened: Opened, division: Division, seed: int) -> ManifestIdentity:
    """What a record says of a divided set; the hash is over (role, class, sha256 of pixels) of each image in the set's own order.

    Args:
        name: the set.
        images: after all of them have been read.
        opened: the same set.
        division: how it was divided.
        seed: of the division's draws.
    """
    roles = {at: role for role in ("train", "val", "test") for at in getattr(division, role).tolist()}
    hasher = hashlib.sha256()
    for at in sorted(roles):
        hasher.update(f"{roles[at]}\t{opened.classes[int(images.label[at])]}\t{images.digest[at]}\n".encode())
    spec = opened.spec
    own = "val" in opened.part
    rule: dict[str, Any] = {"source": f"torchvision.datasets.{spec.reader}", "seed": seed, "validation": len(division.val)}
    rule |= {"drawn": "nothing" if own else f"{spec.val_share:g} of each class's train images for validation"}
    rule |= {} if spec.train_per_class is None else {"train_per_class": spec.train_per_class}
    return ManifestIdentity(
        sha256=hasher.hexdigest(),
        dataset=spec.title,
        subset=name,
        rule=rule,
        classes=opened.classes,
        large=(),
        train=len(division.train),
        search=len(division.train) + len(division.val),
        query=len(division.test),
    )
