"""Finds the ResNets of a checkpoint and sorts its tensors.

One rule reads most files: a ResNet is found wherever, in any container of the file, tensors with a common prefix have the names
of a ResNet. Names are compared after the wrappers of DataParallel, torch.compile, FSDP and activation checkpointing are removed.
If several prefixes have a ResNet, one of them may be a teacher by its name; equal weights under two names are one ResNet;
otherwise the user has to choose. The rest of the names follows torchvision's naming scheme, which timm also uses, or one of two
others that map to it one to one.

`LAYOUTS` lists the trainers whose files are known, with the facts that names and shapes do not show.

Sources: UMBCvision/ISD at 4bdd603 (train_isd.py, train_isd_plus.py, train_byol.py, convert_everything.py), UMBCvision/MSF
(train_msf.py), facebookresearch/moco (moco/builder.py), facebookresearch/moco-v3 (moco/builder.py), vturrisi/solo-learn
(solo/methods/base.py), huggingface/transformers (modeling_resnet.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from isd_repro.checkpoints.read import Raw, tensors_in
from isd_repro.runtime.errors import DataError, one_line

Padding = Literal["1", "2", "same"]

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_BLOCK = r"\.0\.(?:conv1|bn1)\.weight"
_TEACHER = re.compile(r"encoder_[kt](?![a-z])|momentum|teacher|target|(?:^|[^a-z])(?:ema|key)(?![a-z])")
_BACKBONE = re.compile(r"^(?:conv1|bn1|layer[1-4])\.")
# Names inside a ResNet's prefix whose tensors take part in its features, or may.
_PART = re.compile(r"^(?:conv|bn|norm|gn|layer|stem|stage|act|relu|\w*pool)\w*(?:\.|$)|^[0-8]\.")
_WORD = r"(?:^|\.)(?:[a-z0-9]+_)*"
_HEAD = re.compile(_WORD + r"(?:fc\d*|heads?|mlp|neck|proj\w*|pred(?:ict)?\w*|prototypes?\d*|classifier|linear\w*)(?:\.|_|$)")
_BANK = re.compile(_WORD + r"(?:queue\d*|labels|bank|memory)(?:\.|_|$)")
_BARE = "strides, padding and activations do not show in shapes and are assumed to be torchvision's"
_SHOWN = 6


@dataclass(frozen=True)
class TrainerLayout:
    """A trainer whose files are known.

    Attributes:
        marks: regular expressions, each of which must match some name besides the student's weights.
        keys: keys that must exist at the file's top level.
        absent: a regular expression that must match no name.
        padding: of a 3x3 stem, or "same" if every convolution with a stride pads as TensorFlow's SAME.
        note: what is assumed about such a file.
    """

    name: str
    marks: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    absent: str = r"^$"
    padding: Padding = "1"
    note: str = ""


_Q, _PREDICT, _QUEUE = r"^encoder_q\.", r"^predict_q\.", r"^queue$"
OURS = TrainerLayout("isd-repro encoder")
LAYOUTS = (
    TrainerLayout(
        "isd-repro resume",
        keys=("fingerprint", "method", "optimizer", "progress"),
        note="a training checkpoint does not record how its images were prepared",
    ),
    TrainerLayout("msf", (_Q, r"^encoder_t\.")),
    TrainerLayout("isd-plus", (r"^encoder_q\.fc\.", _PREDICT, _QUEUE)),
    TrainerLayout("isd", (_Q, _PREDICT, _QUEUE)),
    TrainerLayout(
        "byol, converted from JAX",
        (_Q, _PREDICT),
        absent="num_batches_tracked$",
        padding="same",
        note="weights converted from JAX: convolutions and max-pool with a stride are padded as TensorFlow's SAME",
    ),
    TrainerLayout("byol", (_Q, _PREDICT)),
    TrainerLayout("moco-v2", (r"^encoder_q\.fc\.[02]\.",)),
    TrainerLayout("moco", (_Q,)),
    TrainerLayout("moco-v3", (r"^base_encoder\.", r"^momentum_encoder\.")),
    TrainerLayout(
        "solo-learn",
        (r"^(?:backbone|encoder)\.", r"^classifier\.weight$", r"^(?:projector|momentum_\w+)\."),
        keys=("pytorch-lightning_version",),
        padding="2",
        note=_BARE,
    ),
)


def _numbered(name: str) -> str:
    """Children of `nn.Sequential(*resnet.children())`; 2, 3 and 8 are ReLU, max-pool and average pool, without tensors."""
    child, _, rest = name.partition(".")
    known = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    return f"{known[child]}.{rest}" if child in known else name


def _transformers(name: str) -> str:
    """`ResNetModel` of transformers."""
    short = {"convolution": "conv", "normalization": "bn"}
    name = re.sub(r"^encoder\.stages\.(\d)\.layers\.", lambda found: f"layer{int(found[1]) + 1}.", name)
    name = re.sub(r"^embedder\.embedder\.(convolution|normalization)\.", lambda found: f"{short[found[1]]}1.", name)
    name = re.sub(r"\.shortcut\.(?:(convolution)|normalization)\.", lambda found: f".downsample.{0 if found[1] else 1}.", name)
    return re.sub(r"\.layer\.(\d)\.(convolution|normalization)\.", lambda found: f".{short[found[2]]}{int(found[1]) + 1}.", name)


# The first block of a ResNet -> what makes torchvision's names of its names.
_NAMINGS: dict[str, tuple[re.Pattern[str], Callable[[str], str]]] = {
    "torchvision's names": (re.compile(rf"^(|.*\.)layer1{_BLOCK}$"), str),
    "numbered children": (re.compile(rf"^(|.*\.)4{_BLOCK}$"), _numbered),
    "transformers' names": (
        re.compile(r"^(|.*\.)encoder\.stages\.0\.layers\.0\.layer\.0\.(?:convolution|normalization)\.weight$"),
        _transformers,
    ),
}


@dataclass(frozen=True)
class Place:
    """The place of a ResNet: a container ("" is the top level; "a/b" is b in a), a prefix of names, and a naming scheme."""

    container: str
    prefix: str
    naming: str

    def __str__(self) -> str:
        return "/".join(part for part in (self.container, self.prefix) if part) or "the top level"


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        key: its name as the file has it.
        use: "backbone", "counter", "head dropped", "dropped", "bank", "optimizer" or "not used".
        encoder: "student", "teacher" or "".
        name: torchvision's name, for "backbone" and "counter".
    """

    key: str
    tensor: Tensor
    use: str
    encoder: str = ""
    name: str = ""


@dataclass(frozen=True)
class Parsed:
    """A file's tensors, sorted by their use; `encoders` holds entries by encoder and by torchvision's name."""

    layout: TrainerLayout
    entries: tuple[Entry, ...]
    encoders: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)  # by encoder, for messages
    notes: tuple[str, ...] = ()


States = Mapping[str, Mapping[str, tuple[str, Tensor]]]  # container -> bare name -> name in the file, tensor


def parse(raw: Raw, key: str | None = None, prefix: str | None = None, *, drop_unknown: bool = False) -> Parsed:
    """Find the encoders and sort the tensors.

    Args:
        raw: the file's content.
        key: read only this container and its content.
        prefix: read only the ResNet under this prefix.
        drop_unknown: ignore modules that are neither part of the ResNet nor a known head.

    Raises:
        DataError: there is no ResNet, or there are several that are not a student and its teacher; or two names are equal
            without their wrappers.
    """
    states = _states(raw)
    notes: list[str] = []
    found: list[Place] = []
    if raw.header is not None:
        places = {name: Place("", f"{name}.", "torchvision's names") for name in ("student", "teacher")}
        places = {name: place for name, place in places.items() if any(each.startswith(place.prefix) for each in states[""])}
        container, layout = "", OURS
    else:
        found = list(dict.fromkeys(_places(states)))
        places = _chosen(raw, states, _asked(raw, found, key, prefix), notes)
        container = next(iter(places.values())).container
        layout = _layout(raw, states[container], places)
        everything = [name for names in states.values() for name in names]
        if layout.padding != "same" and not any(name.endswith("num_batches_tracked") for name in everything):
            origin = "written before torch 0.4.1, or converted from TensorFlow or JAX, whose networks pad otherwise"
            notes.append(f"no num_batches_tracked: {origin} (--padding same)")
    entries: list[Entry] = []
    encoders: dict[str, dict[str, Entry]] = {encoder: {} for encoder in places}
    for at, names in states.items():
        for name, (file_key, tensor) in names.items():
            shown = file_key if at == container else f"{at}/{file_key}".lstrip("/")
            entry = _sort(places, found, at, name, Entry(shown, tensor, "not used"), drop_unknown)
            if entry.name and (twin := encoders[entry.encoder].setdefault(entry.name, entry)) is not entry:
                both = f"{twin.key} and {entry.key} are both {entry.name}"
                raise DataError(f"{raw.path}: {both}", "keep one of them and save the file again")
            entries.append(entry)
    inside = {id(tensor) for names in states.values() for _, tensor in names.values()}
    for at, tensor in tensors_in(raw.tree):
        if id(tensor) not in inside:
            entries.append(Entry(at, tensor, "optimizer" if at.startswith("optimizer") else "not used"))
    prefixes = {name: place.prefix if place.container == container else str(place) for name, place in places.items()}
    return Parsed(layout, tuple(entries), encoders, prefixes, tuple(notes))


def _states(raw: Raw) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """Every container with tensors, except the optimizer's; names are without wrappers."""
    found: dict[str, dict[str, tuple[str, Tensor]]] = {"": {}}
    stack: list[tuple[str, Mapping[Any, Any]]] = [("", raw.tree)]
    while stack:
        place, content = stack.pop()
        inside: list[tuple[str, Mapping[Any, Any]]] = []
        for key, value in content.items():
            if isinstance(value, Tensor):
                names, bare = found.setdefault(place, {}), _WRAPPERS.sub("", str(key))
                if bare in names:
                    both = f"{names[bare][0]} and {key} are both {bare} without module. and other wrappers"
                    raise DataError(f"{raw.path}: {both}", "keep only one of them and save the file again")
                names[bare] = (str(key), value)
            elif isinstance(value, dict) and not (place == "" and str(key).startswith("optimizer")):
                inside.append((f"{place}/{key}".lstrip("/"), value))
        stack += reversed(inside)
    return found


def _places(states: States) -> Iterator[Place]:
    """Every place with a ResNet or with the beginning of one."""
    for container, names in states.items():
        for name in names:
            for naming, (first, _) in _NAMINGS.items():
                if match := first.match(name):
                    yield Place(container, match[1], naming)


def _asked(raw: Raw, found: Sequence[Place], key: str | None, prefix: str | None) -> list[Place]:
    """The places in the requested container and under the requested prefix."""
    kept = [place for place in found if key is None or place.container == key or place.container.startswith(f"{key}/")]
    kept = [place for place in kept if prefix is None or place.prefix.rstrip(".") == _WRAPPERS.sub("", f"{prefix}.").rstrip(".")]
    if kept:
        return kept
    if found:
        asked = " and ".join(f"{name} {value}" for name, value in (("--key", key), ("--prefix", prefix)) if value is not None)
        there = f"there are {_listed(found)}"
        raise DataError(f"{raw.path}: no ResNet under {asked}; {there}", "give one of these, or omit the option")
    raise _unknown(raw)


def _chosen(raw: Raw, states: States, places: list[Place], notes: list[str]) -> dict[str, Place]:
    """Student and teacher among these; a single ResNet is the student, whatever it is called."""
    students = _distinct([place for place in places if not _TEACHER.search(str(place))], states)
    teachers = _distinct([place for place in places if _TEACHER.search(str(place))], states)
    if not students and len(teachers) == 1:
        notes.append(f"the only encoder of the file, under {teachers[0]}, is evaluated as the student")
        students, teachers = teachers, []
    if len(students) != 1:
        found = f"{len(students or teachers)} different ResNets: {_listed(students or teachers)}"
        raise DataError(f"{raw.path}: {found}", "choose one with --key (the container) or --prefix")
    if len(teachers) > 1:
        notes.append(f"no teacher is read, because there are several: {_listed(teachers)}; --key and --prefix choose one")
    return {"student": students[0]} | ({"teacher": teachers[0]} if len(teachers) == 1 else {})


def _distinct(places: list[Place], states: States) -> list[Place]:
    """The places without repetitions of the same weights."""
    found: list[tuple[Place, dict[str, Tensor]]] = []
    for place in places:
        names, rename = states[place.container].items(), _NAMINGS[place.naming][1]
        inner = {rename(name[len(place.prefix) :]): tensor for name, (_, tensor) in names if name.startswith(place.prefix)}
        own = {name: tensor for name, tensor in inner.items() if _BACKBONE.match(name)}
        if not any(own.keys() == other.keys() and all(_equal(own[name], other[name]) for name in own) for _, other in found):
            found.append((place, own))
    return [place for place, _ in found]


def _equal(one: Tensor, other: Tensor) -> bool:
    try:
        return torch.equal(one, other)
    except RuntimeError:  # torch does not compare all types, such as float8
        return False


def _listed(places: Sequence[Place]) -> str:
    shown = ", ".join(one_line(str(place), 80) for place in places[:_SHOWN])
    return shown + (f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")


def _layout(raw: Raw, names: Mapping[str, object], places: Mapping[str, Place]) -> TrainerLayout:
    for layout in LAYOUTS:
        marked = all(any(re.search(mark, name) for name in names) for mark in layout.marks)
        if marked and set(layout.keys) <= raw.tree.keys() and not any(re.search(layout.absent, name) for name in names):
            return layout
    return TrainerLayout(next(iter(places.values())).naming, note=_BARE)


def _sort(places: Mapping[str, Place], others: Sequence[Place], container: str, name: str, entry: Entry, drop: bool) -> Entry:
    """The entry with its use; the longest prefix of any ResNet of the container owns a name."""
    owners = [(encoder, place) for encoder, place in places.items() if place.container == container]
    owners += [("", place) for place in others if place.container == container and place not in places.values()]
    mine = [(encoder, place) for encoder, place in owners if name.startswith(place.prefix)]
    encoder, place = max(mine, key=lambda each: len(each[1].prefix), default=("", None))
    if place is None or not encoder:
        return replace(entry, use=_outside(name) or "not used")
    inner = _NAMINGS[place.naming][1](name[len(place.prefix) :])
    if not _BACKBONE.match(inner) and others:
        dropped = "not used" if inner == "n_averaged" else _outside(inner.partition(".")[0])  # of torch's AveragedModel
        if dropped or (drop and not _PART.match(inner)):
            return replace(entry, use=dropped or "dropped", encoder=encoder)
    use = "counter" if inner.endswith("num_batches_tracked") else "backbone"
    return replace(entry, use=use, encoder=encoder, name=inner)


def _outside(name: str) -> str:
    """The use of a tensor or a module that is no part of a ResNet; "" if its name does not say."""
    return "bank" if _BANK.search(name) else "head dropped" if _HEAD.search(name) else ""


def _unknown(raw: Raw) -> DataError:
    """The error for a file without a ResNet, which says what was found instead."""
    names = [place for place, _ in tensors_in(raw.tree)]
    if not names:
        held = f"found {one_line(', '.join(list(raw.tree)[:_SHOWN]))}" if raw.tree else "the file is empty"
        return DataError(f"{raw.path}: no tensors in it: {held}", "save model.state_dict() and give that file")
    shown = ", ".join([*names[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])])
    signs = {
        r"\.\d+\.\d+\.shortcut\.[01]\.": "lightly's own ResNet, whose exported form leaves out the ReLU behind the stem",
        r"cls_token|pos_embed": "a vision transformer",
        r"(?:^|/)conv2d_\d+\.": "CompRess's SimCLR ResNet-50x4, with numbered layers",
    }
    seen = [f"; this looks like {words}" for sign, words in signs.items() if any(re.search(sign, name) for name in names)]
    return DataError(
        f"{raw.path}: no ResNet among its {len(names)} tensors ({shown}): none is named layer1.0.conv1.weight, under any prefix"
        + "".join(seen[:1]),
        "if it is a ResNet, rename its tensors to torchvision's names and save them with safetensors (docs/checkpoints.md)",
    )
