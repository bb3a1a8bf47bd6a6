"""What `evaluate` is asked: the options of the command, checked, and the command that asks the same again."""

from __future__ import annotations

import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isd_repro.runtime.errors import ConfigError, printable

LEAST, MOST = 8, 4096  # pixels of a side: less leaves no image, more no memory for a block of 256
_NAME_MAX = 200  # bytes; beside it a file of the same name and 20 more is written first


@dataclass(frozen=True)
class Request:
    """What is asked; the options of the command.

    Attributes:
        ckpt: the checkpoint.
        data: a folder or zip of images, or None with `prepared`.
        prepared: a prepared subset of the pipeline.
        listed: one of the authors' lists, which names classes and groups.
        image_size, crop_ratio, mean, std: None takes what the file says, else ImageNet's.
        seeds: heads of the paper's protocol for each encoder, from seeds 0 to seeds - 1.
        epochs: None is the paper's 40; fewer is a shortened protocol and named so.
        cache: keep features for the next evaluation.
        workers: threads that decode; changes no number.
    """

    ckpt: Path
    data: Path | None = None
    prepared: Path | None = None
    listed: Path | None = None
    protocol: Literal["knn", "linear", "all"] = "knn"
    which: Literal["student", "teacher", "both"] = "student"
    arch: str = "auto"
    teacher_bn: Literal["own", "student"] = "own"
    image_size: int | None = None
    crop_ratio: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    ks: tuple[int, ...] = (1, 20)
    seeds: int = 1
    epochs: int | None = None
    cache: bool = True
    workers: int | None = None
    label: str | None = None
    out: Path | None = None
    per_class: bool = False
    as_json: bool = False

    def check(self) -> None:
        """`ConfigError` where options contradict each other, a value is out of its range, or `--out` cannot be written."""
        if (self.data is None) == (self.prepared is None):
            raise ConfigError(
                "name the images with either --data or --prepared", "--data takes a folder, --prepared one of the pipeline's"
            )
        if self.listed is not None and self.data is None:
            raise ConfigError("--list goes with --data", "a prepared folder says itself which classes are large")
        self._check_view()
        self._check_counts()
        if self.label is not None and (not self.label.strip() or "\n" in self.label or printable(self.label) != self.label):
            raise ConfigError("--label: is empty or has characters that cannot be seen", "give words as a table shows them")
        if self.out is not None:
            self._check_out(self.out)

    def _check_view(self) -> None:
        if self.image_size is not None and not LEAST <= self.image_size <= MOST:
            raise ConfigError(f"--image-size {self.image_size}: must be {LEAST} to {MOST}", "give a side in pixels")
        if self.crop_ratio is not None and not 0 < self.crop_ratio <= 1:
            raise ConfigError(f"--crop-ratio {self.crop_ratio}: must be above 0 and at most 1", "the paper's is 0.875")
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise ConfigError("--mean: every value must be a finite number", "ImageNet's is 0.485,0.456,0.406")
        if self.std is not None and not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ConfigError("--std: every value must be a finite number above 0", "ImageNet's is 0.229,0.224,0.225")

    def _check_counts(self) -> None:
        """Numbers in their range, and none for a protocol that is not run."""
        if not self.ks or min(self.ks) < 1 or self.seeds < 1 or (self.epochs is not None and self.epochs < 1):
            raise ConfigError(
                "--k, --linear-seeds and --linear-epochs must be 1 or more", "leave them out for the paper's values"
            )
        if len(set(self.ks)) < len(self.ks):
            raise ConfigError(f"--k: {', '.join(map(str, self.ks))} repeats a number", "give each number once")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers {self.workers}: must be 1 or more", "leave it out for as many as there are cores")
        unused = {
            "--k": self.protocol == "linear" and self.ks != Request.ks,
            "--linear-seeds": self.protocol == "knn" and self.seeds != 1,
            "--linear-epochs": self.protocol == "knn" and self.epochs is not None,
            "--workers": self.data is None and self.workers is not None,
        }
        for option in (name for name, wrong in unused.items() if wrong):
            where = "--prepared, which is not decoded" if option == "--workers" else f"--protocol {self.protocol}"
            raise ConfigError(f"{option} has no effect with {where}", f"leave {option} out, or ask for what it is about")

    def _check_out(self, out: Path) -> None:
        """Before the work, not after it: that the record can be written where it shall be, and takes no input's place."""
        hint = "--out names a file; `report` reads records/<name>/external.json"
        try:
            found = out.stat()
        except (FileNotFoundError, NotADirectoryError):
            found = None
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}", hint) from error
        if found is not None and not stat.S_ISREG(found.st_mode):
            what = "is a folder" if stat.S_ISDIR(found.st_mode) else "is a pipe or a device, no file"
            raise ConfigError(f"--out {out}: {what}", hint)
        for given in (self.ckpt, self.data, self.listed):
            if found is not None and given is not None and given.exists() and out.samefile(given):
                raise ConfigError(f"--out {out}: is the very file that is read", hint)
        if len(os.fsencode(out.name)) > _NAME_MAX:
            raise ConfigError(f"--out: its name has more than {_NAME_MAX} bytes", hint)
        folder = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            what = "cannot be written to" if folder.is_dir() else "is no folder"
            raise ConfigError(f"--out {out}: {folder} {what}", "name another folder, or permit writing")
        _ = self.name  # which says where it is none

    @property
    def name(self) -> str:
        """The record's folder where `report` will look for it, else the checkpoint's name made fit to be one."""
        own = self.out.resolve().parent.name if self.out is not None and self.out.name == "external.json" else ""
        text = re.sub(r"[^a-z0-9.-]+", "-", (own or self.ckpt.name.split(".")[0]).lower()).lstrip("-.") or "checkpoint"
        if own and text != own:
            raise ConfigError(f"{self.out}: {own!r} is no name of a record", "use small letters, digits, dots and hyphens")
        return text

    @property
    def command(self) -> str:
        """The command that asks for the same numbers, without folders, which differ from machine to machine."""
        words = ["isd-repro evaluate", f"--ckpt {self.ckpt.name}"]
        places = {"data": self.data, "prepared": self.prepared, "list": self.listed}
        words += [f"--{name} {path.name}" for name, path in places.items() if path is not None]
        plain = Request(self.ckpt)
        options = {"protocol": "protocol", "which": "which", "arch": "arch", "teacher_bn": "teacher-bn"}
        options |= {"image_size": "image-size", "crop_ratio": "crop-ratio", "seeds": "linear-seeds", "epochs": "linear-epochs"}
        words += [
            f"--{option} {getattr(self, key)}" for key, option in options.items() if getattr(self, key) != getattr(plain, key)
        ]
        lists = {"mean": self.mean, "std": self.std}
        words += [f"--{name} {','.join(map(str, values))}" for name, values in lists.items() if values is not None]
        words += [f"--k {k}" for k in self.ks] if self.ks != plain.ks else []
        return " ".join(words)


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """`0.485,0.456,0.406` as numbers; `ConfigError` where it is none."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} {text}: not numbers", "give one for each channel, as 0.485,0.456,0.406") from error
