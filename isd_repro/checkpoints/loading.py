"""Loads the encoders of a checkpoint: read, recognise the layout, account for every tensor, build."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from isd_repro.checkpoints import account, layouts, read
from isd_repro.checkpoints.account import TensorUse
from isd_repro.checkpoints.architectures import AUTO, Architecture, infer, settle
from isd_repro.checkpoints.layouts import Entry, Padding, Parsed
from isd_repro.interfaces import Backbone
from isd_repro.nn import backbones
from isd_repro.runtime.errors import ConfigError, DataError, one_line
from isd_repro.tensor_files import EncoderIdentity, encoder_identity

Which = Literal["student", "teacher", "both"]
Statistics = Literal["own", "student"]
# Keys under which trainers save the name of the architecture, names of ResNets, and those of ResNets without any addition.
_NAMED = {"arch", "architecture", "model", "model_name", "backbone", "backbone_name", "encoder", "encoder_name", "base_model"}
_RESNET = re.compile(r"[a-z]*resne[stx]\w*?\d\w*")
_PLAIN = re.compile(r"resnet\d+(?:x\d)?(?:_\w+)?")


@dataclass(frozen=True)
class Checkpoint:
    """The encoders of a file, and the use of each of its tensors.

    Attributes:
        sha256: of the file's bytes.
        layout: name of the layout.
        arch: name of the architecture, as for `--arch`.
        channels: number of image channels that the encoders take.
        encoders: modules B x C x H x W -> B x `features` by name, in eval mode, float32, on the CPU.
        image_size: pixels; like the next three it is None if the file does not state it.
        identity: the header of this project's encoder files.
        notes: assumptions about what the file does not show.
    """

    path: Path
    sha256: str
    layout: str
    arch: str
    channels: int
    encoders: Mapping[str, nn.Module]
    tensors: tuple[TensorUse, ...]
    image_size: int | None = None
    crop_ratio: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    identity: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """The account of a file, whose encoders may be incomplete; `problems` is empty if `load` would succeed."""

    path: Path
    sha256: str
    size: int  # bytes
    form: str
    layout: str = ""  # where none fits
    arch: str = ""  # where none is near
    encoders: tuple[str, ...] = ()
    tensors: tuple[TensorUse, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Blueprint:
    """A network on the meta device and what is known of it."""

    network: Backbone
    arch: str
    channels: int
    notes: tuple[str, ...]


def load(
    path: Path,
    which: Which = "student",
    *,
    arch: str = AUTO,
    teacher_bn: Statistics = "own",
    key: str | None = None,
    prefix: str | None = None,
    padding: Padding | None = None,
    drop_unknown: bool = False,
) -> Checkpoint:
    """Build the encoders of a checkpoint.

    Args:
        path: the file.
        which: the encoders to build.
        arch: a name to compare with the shapes; for a training checkpoint of `resnet-narrow` also the stem and the pooling grid
            ("-strided:2"). If the file names a variant whose tensors are those of a plain ResNet, the plain ResNet's name
            overrides it.
        teacher_bn: "own": the teacher's running statistics; "student": the student's, as in the released evaluation code.
        key: the container of the encoder, if the file has several.
        prefix: the prefix of the encoder's tensors, if the file has several encoders.
        padding: of a 3x3 stem, or "same" for TensorFlow's; None means the layout's.
        drop_unknown: ignore modules that are neither part of the ResNet nor a known head.

    Raises:
        ConfigError: `arch` is unknown, or `teacher_bn` is given but no teacher is requested.
        DataError: the file cannot be read, has no ResNet or several, lacks the requested encoder, or its tensors are not exactly
            those of its architecture; the message names each tensor that is missing, unexpected, of another shape or not finite.
    """
    if teacher_bn == "student" and which == "student":
        raise ConfigError("--teacher-bn student: no teacher is evaluated", "add --which teacher or --which both")
    raw = read.read(path)
    parsed, header = layouts.parse(raw, key, prefix, drop_unknown=drop_unknown), _header(raw)
    wanted = ("student", "teacher") if which == "both" else (which,)
    encoders: dict[str, nn.Module] = {}
    used: dict[str, set[str]] = {}
    plans = []
    for encoder in wanted:
        tensors = _tensors_of(path, parsed, encoder, teacher_bn, _names(parsed, header))
        plan = _blueprint(parsed, tensors, header, arch, padding, f"{path}: {encoder}")
        encoders[encoder] = _filled(plan, parsed, tensors, encoder, path)
        plans.append(plan)
        for name, entry in tensors.items():
            used.setdefault(entry.encoder, set()).add(name)
    archs = dict.fromkeys(plan.arch for plan in plans)
    notes = [*parsed.notes, *_stated(raw, archs, arch), *(note for plan in plans for note in plan.notes)]
    return Checkpoint(
        path=path,
        sha256=raw.sha256,
        layout=parsed.layout.name,
        arch=" / ".join(archs),
        channels=plans[0].channels,
        encoders=encoders,
        tensors=tuple(account.uses(parsed, wanted, used)),
        image_size=header.image_size if header else None,
        crop_ratio=header.crop_ratio if header else None,
        mean=header.mean if header else None,
        std=header.std if header else None,
        identity=raw.header,
        notes=tuple(dict.fromkeys([*notes, *account.conversions(parsed, used)])),
    )


def inspect(path: Path, key: str | None = None, prefix: str | None = None) -> Inspection:
    """The account of a file, even if its encoders are incomplete; for a pickle that is refused, names and shapes.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        raw = read.read(path)
    except read.Refused as error:
        listed = tuple(TensorUse(place, *shaped, "not used", "") for place, shaped in error.outline.tensors())
        return Inspection(path, error.sha256, error.size, "refused", tensors=listed, problems=(error.message,))
    about = partial(Inspection, path, raw.sha256, raw.size, raw.form)
    try:
        parsed, header = layouts.parse(raw, key, prefix), _header(raw)
    except DataError as error:
        listed = tuple(account.row(Entry(place, tensor, ""), "not used") for place, tensor in read.tensors_in(raw.tree))
        return about(tensors=listed, problems=(f"{error.message}; {error.hint}",))
    names = _names(parsed, header)
    everything = {name: set(parsed.encoders.get(name, {})) for name in names}
    rows = account.uses(parsed, names, everything)
    found: list[str] = []
    notes: list[str] = [*parsed.notes, *account.conversions(parsed, everything)]
    archs: list[str] = []
    for encoder in names:
        tensors = parsed.encoders.get(encoder, {})
        try:
            plan = _blueprint(parsed, tensors, header, AUTO, None, f"{path}: {encoder}")
            archs.append(plan.arch)
            notes += plan.notes
            _filled(plan, parsed, tensors, encoder, path)
        except _Misfit as error:
            found.append(error.message)
            rows = [replace(row, use=error.found.marks.get(row.key, row.use)) for row in rows] + list(error.found.missing)
        except DataError as error:
            found.append(error.message)
    try:
        notes += _stated(raw, archs, AUTO) if archs else []
    except DataError as error:
        found.append(error.message)
    arch = " / ".join(dict.fromkeys(archs))
    return about(parsed.layout.name, arch, names, tuple(rows), tuple(found), tuple(dict.fromkeys(notes)))


class _Misfit(DataError):
    """An encoder differs from its architecture."""

    def __init__(self, message: str, found: account.Differences) -> None:
        super().__init__(message, found.hint)
        self.found = found


def _header(raw: read.Raw) -> EncoderIdentity | None:
    return None if raw.header is None else encoder_identity(raw.path, raw.header)


def _names(parsed: Parsed, header: EncoderIdentity | None) -> tuple[str, ...]:
    """Names of the file's encoders, by the header if there is one, because raw pixels are an encoder without tensors."""
    return header.encoders if header else tuple(parsed.encoders)


def _tensors_of(path: Path, parsed: Parsed, encoder: str, teacher_bn: Statistics, names: tuple[str, ...]) -> dict[str, Entry]:
    if encoder not in names:
        found = f"no {encoder} in it (layout {parsed.layout.name}: {', '.join(names) or 'no encoder'})"
        raise DataError(f"{path}: {found}", f"use --which {names[0]}" if names else "the file contains no backbone")
    own = dict(parsed.encoders.get(encoder, {}))
    if encoder == "teacher" and teacher_bn == "student":
        student = parsed.encoders.get("student", {})
        own = {name: own[name] for name in own if ".running_" not in name}
        own |= {name: student[name] for name in student if ".running_" in name}
    return own


def _blueprint(
    parsed: Parsed, tensors: Mapping[str, Entry], header: EncoderIdentity | None, arch: str, padding: Padding | None, where: str
) -> _Blueprint:
    if header is not None:
        return _own(header, tensors, arch, where)
    shapes = {name: tuple(entry.tensor.shape) for name, entry in tensors.items()}
    found: Architecture = settle(infer(shapes, where), arch, where, known=False)
    notes = [parsed.layout.note] if parsed.layout.note else []
    if found.family == "resnet-narrow":
        source = "the defaults; --arch resnet-narrow-strided:N says otherwise" if arch == AUTO else "as --arch says"
        stem = f"a stem of stride {2 if found.strided else 1} and a pooling grid of {found.pool} x {found.pool}"
        notes.append(f"assumed to have {stem} ({source}), which shapes do not show")
        if padding is not None:
            raise ConfigError("--padding: resnet-narrow always pads by 1", "omit --padding")
        return _Blueprint(found.build(), found.name, found.channels, tuple(notes))
    if padding in {"1", "2"} and not found.small:
        raise ConfigError(f"--padding {padding}: the stem is 7x7, which pads by 3", "omit --padding, or give --padding same")
    found = replace(found, padding=padding or parsed.layout.padding)
    if found.small:
        source = "as --padding says" if padding else "solo-learn's" if found.padding == "2" else "torchvision's way"
        assumed = f"stride 1, no max-pool and padding {found.padding} ({source}), which shapes do not show"
        notes.append(f"3x3 stem: assumed to have {assumed}; --padding states another padding")
    return _Blueprint(found.build(), found.name, found.channels, tuple(notes))


def _own(header: EncoderIdentity, tensors: Mapping[str, Entry], arch: str, where: str) -> _Blueprint:
    """The blueprint of one of this project's files, whose header states the architecture; `--arch` must agree with it."""
    config = header.backbone
    with torch.device("meta"):
        network = backbones.build(config, header.image_size)
    small = config.stem == "small" and config.arch not in ("pixels", "resnet-narrow")
    strided = config.stem == "strided"
    suffix = "-small" if small else "-strided" if strided else ""
    name = config.arch + suffix + (f":{config.pool}" if config.pool > 1 else "")
    if config.arch != "pixels" and arch != AUTO:
        shapes = {key: tuple(entry.tensor.shape) for key, entry in tensors.items()}
        settle(replace(infer(shapes, where), pool=config.pool, strided=strided), arch, where, known=True)
    elif arch not in {AUTO, "pixels"}:
        raise DataError(f"{where}: --arch says {arch}, but the file is the raw-pixels encoder", "leave --arch at auto")
    return _Blueprint(network, name, config.channels, ())


def _filled(plan: _Blueprint, parsed: Parsed, tensors: Mapping[str, Entry], encoder: str, path: Path) -> nn.Module:
    """Fill the network with weights of exactly its names and shapes; counters that the file lacks are 0."""
    expected, where = plan.network.state_dict(), f"{path}: {encoder}"
    if differences := account.compare(tensors, expected, encoder, parsed.prefixes.get(encoder, "")):
        raise _Misfit(f"{where}, {plan.arch}: {differences.words}", differences)
    weights = account.float32(tensors, where)
    state = {name: weights.get(name, torch.zeros((), dtype=torch.int64)) for name in expected}
    plan.network.load_state_dict(state, strict=True, assign=True)
    return plan.network.eval().requires_grad_(False)


def _stated(raw: read.Raw, archs: Iterable[str], given: str) -> list[str]:
    """Notes on architecture names in the file, at its top level or among saved arguments, that differ from what its shapes say.

    Raises:
        DataError: the file names a variant that may have a plain ResNet's tensors, and `given` does not override it.
    """
    notes: dict[str, None] = {}
    plain = {_spelled(arch) for arch in archs}
    places = [raw.tree, *(vars(value) if isinstance(value, Namespace) else value for value in raw.tree.values())]
    for place in places:
        for key, name in place.items() if isinstance(place, dict) else ():
            found = _RESNET.search(_spelled(name)) if key in _NAMED and isinstance(name, str) else None
            if found is None or _spelled(name) in plain:
                continue
            if given == AUTO and not _PLAIN.fullmatch(found.group()):
                what = f"the file calls itself {one_line(name)}, a variant whose features a plain ResNet does not give"
                raise DataError(f"{raw.path}: {what}", f"if it is a plain ResNet, say so with --arch {next(iter(archs))}")
            notes[f"the file calls itself {one_line(name)}; it is read as {' / '.join(archs)}, as its tensor shapes say"] = None
    return list(notes)


def _spelled(name: str) -> str:
    """The name of an architecture in a normalised spelling, without the hub's folder and timm's tag."""
    name = re.sub(r"(?<=resnet)[-_ ](?=\d)", "", name.lower().rpartition("/")[2].partition(".")[0].partition(":")[0])
    return re.sub(r"(?<=\d)w(?=\d)", "x", name.removesuffix("-small"))
