"""Loads the encoders of a checkpoint: read, recognise the layout, account for every tensor, build."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor, nn

from isd_repro.checkpoints import account, layouts, read
from isd_repro.checkpoints.account import TensorUse
from isd_repro.checkpoints.architectures import AUTO, Architecture, infer, settle
from isd_repro.checkpoints.layouts import Entry, Parsed
from isd_repro.config.fields import Frozen, Many, Pixels, Positive
from isd_repro.config.params import BackboneConfig
from isd_repro.interfaces import Backbone
from isd_repro.nn import backbones
from isd_repro.runtime.errors import ConfigError, DataError, one_line

Which = Literal["student", "teacher", "both"]
Statistics = Literal["own", "student"]


class Header(Frozen):
    """The keys in our encoder files' headers that loading needs; other keys are allowed."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    backbone: BackboneConfig
    image_size: Pixels
    crop_ratio: Annotated[float, Field(gt=0, le=1)]
    mean: Many[float]
    std: Many[Positive]
    encoders: Many[str] = ()


@dataclass(frozen=True)
class Checkpoint:
    """Encoders of a file, and what became of each of its tensors.

    Attributes:
        sha256: of the file's bytes.
        layout: the rule that fitted.
        arch: as `--arch` takes it.
        channels: of the images that the encoders take.
        encoders: by name, in eval mode, float32, on the CPU, with an int attribute `features`.
        image_size: pixels; None, like the next three, where the file does not say.
        identity: our encoder files' header.
        notes: what was assumed because the file does not show it.
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
    """The account of a file whose encoders need not be whole; `problems` is empty where `load` would succeed."""

    path: Path
    sha256: str
    size: int  # bytes
    form: str
    layout: str  # "" where none fits
    arch: str  # "" where none is near
    encoders: tuple[str, ...]
    tensors: tuple[TensorUse, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Blueprint:
    """A network on the meta device and what is known of it."""

    network: Backbone
    arch: str
    channels: int
    notes: tuple[str, ...]


def load(path: Path, which: Which = "student", *, arch: str = AUTO, teacher_bn: Statistics = "own") -> Checkpoint:
    """Build the encoders of a checkpoint of any known layout.

    Args:
        path: the file.
        which: the encoders to build.
        arch: a name to check against the shapes; for a resume point of `resnet-narrow` also the pooling grid (":2").
        teacher_bn: "own" running statistics, or with "student" the released evaluation's mix of the teacher's weights with
            the student's statistics (as the released code does).

    Raises:
        ConfigError: an unknown `arch`, or `teacher_bn` without a teacher asked for.
        DataError: the file cannot be read, its layout is unknown, the encoder asked for is not in it, or its tensors are not
            exactly those of its architecture: each one missing, surplus, misshapen or not finite is named.
    """
    if teacher_bn == "student" and which == "student":
        raise ConfigError("--teacher-bn student: no teacher is evaluated", "add --which teacher or --which both")
    raw = read.read(path)
    parsed, header = layouts.parse(raw), _header(raw)
    wanted = ("student", "teacher") if which == "both" else (which,)
    encoders: dict[str, nn.Module] = {}
    used: dict[str, set[str]] = {}
    plans = []
    for encoder in wanted:
        where = f"{path}: {encoder}"
        tensors = _tensors_of(parsed, encoder, teacher_bn, raw)
        plan = _blueprint(parsed, tensors, header, arch, where)
        differences = account.compare(tensors, plan.network.state_dict())
        if differences:
            raise account.refuse(where, plan.arch, account.problems(differences, parsed.prefixes.get(encoder, "")))
        encoders[encoder] = _fill(plan.network, account.float32(tensors, where))
        plans.append(plan)
        for name, entry in tensors.items():
            used.setdefault(entry.encoder, set()).add(name)
    archs = dict.fromkeys(plan.arch for plan in plans)
    notes = dict.fromkeys(
        (
            *parsed.notes,
            *_contradiction(raw, archs),
            *(note for plan in plans for note in plan.notes),
            *_conversions(parsed, used),
        )
    )
    return Checkpoint(
        path=path,
        sha256=raw.sha256,
        layout=parsed.rule.name,
        arch=" / ".join(archs),
        channels=plans[0].channels,
        encoders=encoders,
        tensors=tuple(account.uses(parsed, wanted, used)),
        image_size=header.image_size if header else None,
        crop_ratio=header.crop_ratio if header else None,
        mean=header.mean if header else None,
        std=header.std if header else None,
        identity=raw.header,
        notes=tuple(notes),
    )


def inspect(path: Path) -> Inspection:
    """The account of a file, whether or not its encoders are whole.

    Raises:
        DataError: the file cannot be read.
    """
    raw = read.read(path)
    try:
        parsed, header = layouts.parse(raw), _header(raw)
    except DataError as error:
        listed = tuple(account.row(entry, entry.use) for entry in layouts.unrecognised(raw))
        return Inspection(path, raw.sha256, raw.size, raw.form, "", "", (), listed, (error.message,), ())
    names = _names(parsed, raw)
    everything = {name: set(parsed.encoders.get(name, {})) for name in names}
    rows = account.uses(parsed, names, everything)
    found: list[str] = []
    notes: list[str] = [*parsed.notes, *_conversions(parsed, everything)]
    archs: list[str] = []
    for encoder in names:
        tensors = parsed.encoders.get(encoder, {})
        try:
            plan = _blueprint(parsed, tensors, header, AUTO, f"{path}: {encoder}")
        except DataError as error:
            found.append(error.message)
            continue
        archs.append(plan.arch)
        notes += plan.notes
        prefix = parsed.prefixes.get(encoder, "")
        differences = account.compare(tensors, plan.network.state_dict())
        found += [f"{encoder}: {sentence}" for sentence in account.problems(differences, prefix)]
        rows = _marked(rows, tensors, differences, encoder, prefix)
        if not differences:
            found += _not_finite(tensors, f"{path}: {encoder}")
    arch = " / ".join(dict.fromkeys(archs))
    notes += _contradiction(raw, archs)
    return Inspection(
        path,
        raw.sha256,
        raw.size,
        raw.form,
        parsed.rule.name,
        arch,
        names,
        tuple(rows),
        tuple(found),
        tuple(dict.fromkeys(notes)),
    )


def _marked(
    rows: list[TensorUse], tensors: Mapping[str, Entry], differences: account.Differences, encoder: str, prefix: str
) -> list[TensorUse]:
    """The rows with an encoder's differences in them."""
    marks = {tensors[name].key: "surplus" for name in differences.surplus}
    marks |= {tensors[name].key: "other shape" for name in differences.misshapen}
    marked = [replace(row, use=marks.get(row.key, row.use)) for row in rows]
    return marked + [
        TensorUse(f"{prefix}{name}", shape, "float32", "missing", encoder) for name, shape in differences.missing.items()
    ]


def _not_finite(tensors: Mapping[str, Entry], where: str) -> list[str]:
    try:
        account.float32(tensors, where)
    except DataError as error:
        return [error.message]
    return []


def _header(raw: read.Raw) -> Header | None:
    if raw.header is None:
        return None
    try:
        return Header.model_validate(raw.header)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise DataError(f"{raw.path}: its header is not that of an encoder: {problems}", "run `pretrain` again") from error


def _names(parsed: Parsed, raw: read.Raw) -> tuple[str, ...]:
    """Encoders of the file; raw pixels are an encoder without tensors, so our header has the say."""
    return tuple(raw.header.get("encoders", ())) if raw.header else tuple(parsed.encoders)


def _tensors_of(parsed: Parsed, encoder: str, teacher_bn: Statistics, raw: read.Raw) -> dict[str, Entry]:
    names = _names(parsed, raw)
    if encoder not in names:
        raise DataError(
            f"{raw.path}: no {encoder} in it (layout {parsed.rule.name}: {', '.join(names) or 'no encoder'})",
            f"use --which {names[0]}" if names else "the file contains no backbone",
        )
    own = dict(parsed.encoders.get(encoder, {}))
    if encoder == "teacher" and teacher_bn == "student":
        own = {name: entry for name, entry in own.items() if not _is_statistic(name)}
        own |= {name: entry for name, entry in parsed.encoders.get("student", {}).items() if _is_statistic(name)}
    return own


def _is_statistic(name: str) -> bool:
    return name.endswith((".running_mean", ".running_var"))


def _blueprint(parsed: Parsed, tensors: Mapping[str, Entry], header: Header | None, arch: str, where: str) -> _Blueprint:
    if header is not None:
        return _own(header, tensors, arch, where)
    shapes = {name: tuple(entry.tensor.shape) for name, entry in tensors.items()}
    found: Architecture = settle(infer(shapes, where, parsed.rule.small_padding), arch, where, pool_known=False)
    notes = [parsed.rule.note] if parsed.rule.note and (parsed.rule.small_padding == 1 or found.small) else []
    if found.family == "resnet-narrow":
        grid = "as --arch says" if ":" in arch else "the default; --arch resnet-narrow:N says otherwise"
        notes.append(f"the pooling grid does not show in the shapes: {found.pool} x {found.pool}, {grid}")
    elif found.small:
        notes.append("3x3 stem: assumed to have stride 1 and no max-pool, which shapes do not show")
    return _Blueprint(found.build(), found.name, found.channels, tuple(notes))


def _own(header: Header, tensors: Mapping[str, Entry], arch: str, where: str) -> _Blueprint:
    """Our file says what it holds; `--arch` can only agree."""
    config = header.backbone
    with torch.device("meta"):
        network = backbones.build(config, header.image_size)
    name = config.arch + (
        "-small" if config.arch.startswith("resnet") and "narrow" not in config.arch and config.stem == "small" else ""
    )
    name += f":{config.pool}" if config.pool > 1 else ""
    if config.arch != "pixels" and arch != AUTO:
        shapes = {key: tuple(entry.tensor.shape) for key, entry in tensors.items()}
        settle(replace(infer(shapes, where), pool=config.pool), arch, where, pool_known=True)
    elif arch not in {AUTO, "pixels"}:
        raise DataError(f"{where}: --arch says {arch}, but the file is the raw-pixels encoder", "leave --arch at auto")
    return _Blueprint(network, name, config.channels, ())


def _fill(network: Backbone, tensors: dict[str, Tensor]) -> nn.Module:
    """Put the weights into a network from the meta device; counters that the file lacks are 0."""
    expected = network.state_dict()
    state = {name: tensors[name] if name in tensors else torch.zeros((), dtype=torch.int64) for name in expected}
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _contradiction(raw: read.Raw, archs: Iterable[str]) -> list[str]:
    """Where the file names an architecture (`arch`, at the top or among the saved arguments), and its shapes are another."""
    places = (vars(value) if isinstance(value, Namespace) else value for value in (raw.tree, *raw.tree.values()))
    stated = [place["arch"] for place in places if isinstance(place, dict) and isinstance(place.get("arch"), str)]
    family = re.compile(r"(?:wide_)?resnet(?:\d+|-narrow)")
    return [
        f"the file calls itself {one_line(name)}, but its tensor shapes say {arch}"
        for name in dict.fromkeys(stated)
        for arch in archs
        if (said := family.match(name.lower())) and (shown := family.match(arch)) and said.group() != shown.group()
    ]


def _conversions(parsed: Parsed, used: Mapping[str, set[str]]) -> list[str]:
    """Precisions other than float32 among the weights used."""
    kinds = {
        str(entry.tensor.dtype).removeprefix("torch.")
        for entry in parsed.entries
        if entry.use == "backbone" and entry.name in used.get(entry.encoder, ())
    }
    return [f"weights are {kind} in the file and were converted to float32" for kind in sorted(kinds - {"float32"})]
