"""Recognises the layout of a checkpoint and sorts its tensors; each layout is one small rule, tried in order.

Names are compared after `module.` (DataParallel, wherever it stands) and `_orig_mod.` (torch.compile) are taken out. A rule
says which names mark its layout, under which prefix each encoder stands, which tensors are heads and which are banks. What
it leaves of an encoder's names is torchvision's naming, which is also timm's.

Sources: UMBCvision/ISD at 4bdd603 (train_isd.py, train_isd_plus.py, train_byol.py), UMBCvision/MSF (train_msf.py),
UMBCvision/CompRess (train_student.py), facebookresearch/moco (moco/builder.py), vturrisi/solo-learn (solo/methods/base.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from isd_repro.checkpoints.read import Raw, tensors_in
from isd_repro.runtime.errors import DataError, one_line

_RESNET = r"(?:conv1|bn1|layer[1-4])\."
_FC = (r"^fc\.",)


@dataclass(frozen=True)
class Rule:
    """One layout. Patterns are regular expressions that are searched for in a name."""

    name: str
    marks: tuple[str, ...]  # each is found in some name
    container: str = ""  # the key that holds the state dict; empty means any
    student: tuple[str, ...] = ("",)  # prefixes; the first one that any name has is the file's
    teacher: tuple[str, ...] = ()
    inner_heads: tuple[str, ...] = _FC  # inside an encoder's prefix
    outer_heads: tuple[str, ...] = ()  # outside
    banks: tuple[str, ...] = (r"^queue(?:_ptr)?$", r"^labels$")
    indexed: bool = False  # children are numbered: nn.Sequential(*resnet.children())
    small_padding: int = 1  # of a 3x3 stem; shapes do not show it
    note: str = ""


_AUTHORS: dict[str, Any] = {"student": ("encoder_q.",), "teacher": ("encoder_k.",), "outer_heads": (r"^predict_q\.",)}
_BARE = "strides, padding and activations do not show in shapes and are assumed to be torchvision's"
_MEMORY = (r"memory_bank\.", r"\bqueue")

OURS = Rule("isd-repro encoder", (), student=("student.",), teacher=("teacher.",), inner_heads=())
RULES: tuple[Rule, ...] = (
    Rule(
        "isd-repro resume",
        (r"^student\.",),
        container="method",
        student=("student.backbone.", "student."),
        teacher=("teacher.backbone.", "teacher."),
        inner_heads=(),
        outer_heads=(r"^(?:student|teacher)\.projector\.", r"^predictor\.", r"^classifier\."),
        banks=(r"^bank\.",),
        note="a resume point does not record how its images were prepared",
    ),
    Rule("msf", (r"^encoder_q\.", r"^encoder_t\."), **{**_AUTHORS, "teacher": ("encoder_t.",)}),
    Rule("isd-plus", (r"^encoder_q\.fc\.", r"^predict_q\.", r"^queue$"), **_AUTHORS),
    Rule("isd", (r"^encoder_q\.", r"^predict_q\.", r"^queue$"), **_AUTHORS),
    Rule("byol", (r"^encoder_q\.", r"^predict_q\."), **_AUTHORS),
    Rule("moco-v2", (r"^encoder_q\.fc\.[02]\.",), **_AUTHORS),
    Rule("moco", (r"^encoder_q\.",), **_AUTHORS),
    Rule(
        "solo-learn",
        (rf"^(?:backbone|encoder)\.{_RESNET}", r"^(?:classifier|projector|predictor|momentum_\w+)\."),
        student=("backbone.", "encoder."),
        teacher=("momentum_backbone.", "momentum_encoder."),
        outer_heads=(r"^(?:momentum_)?(?:classifier|projector|predictor)\.", r"^prototypes\."),
        banks=_MEMORY,
        small_padding=2,
        note="solo-learn pads the 3x3 stem of small images by 2",
    ),
    Rule(
        "lightly",
        (rf"^(?:(?:student_)?backbone|encoder)\.{_RESNET}",),
        student=("backbone.", "student_backbone.", "encoder."),
        teacher=("backbone_momentum.", "momentum_backbone.", "teacher_backbone."),
        outer_heads=(r"(?:^|_)(?:projection|prediction)_(?:head|mlp)", r"^(?:student|teacher)_head\."),
        banks=_MEMORY,
    ),
    Rule(
        "lightly indexed",
        (r"^(?:(?:student_)?backbone\.)?[4-7]\.\d+\.(?:conv|bn|downsample)",),
        student=("backbone.", "student_backbone.", ""),
        teacher=("backbone_momentum.", "momentum_backbone.", "teacher_backbone."),
        outer_heads=(r"(?:^|_)(?:projection|prediction)_(?:head|mlp)", r"^(?:student|teacher)_head\."),
        banks=_MEMORY,
        indexed=True,
    ),
    Rule("compress or torchvision", (rf"^{_RESNET}",), container="model", note=_BARE),
    Rule("resnet (torchvision, timm)", (rf"^{_RESNET}",), note=_BARE),
)
# Position in nn.Sequential(*resnet.children()); 2, 3 and 8 are ReLU, max-pool and average pool, without tensors.
_INDEX = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    key: str  # as the file has it
    tensor: Tensor
    use: str  # "backbone", "counter", "head dropped", "bank", "optimizer" or "not used"
    encoder: str = ""
    name: str = ""  # torchvision's name, for "backbone" and "counter"


@dataclass(frozen=True)
class Parsed:
    """A file's tensors, sorted by what they are."""

    rule: Rule
    entries: tuple[Entry, ...]
    encoders: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)  # encoder -> torchvision's name -> entry
    prefixes: Mapping[str, str] = field(default_factory=dict)  # encoder -> prefix
    notes: tuple[str, ...] = ()  # other backbones that the file has, too


def parse(raw: Raw) -> Parsed:
    """Recognise the layout and sort the tensors.

    Raises:
        DataError: no layout fits, two names are the same without their wrappers, or the file is a feature file.
    """
    container, state = _state_dict(raw)
    plain: dict[str, str] = {}  # bare name -> name in the file
    for key in state:
        bare = _bare(key)
        if bare in plain:
            raise DataError(
                f"{raw.path}: {plain[bare]} and {key} are both {bare} without module.",
                "keep only one of them and save the file again",
            )
        plain[bare] = key
    rule = OURS if raw.header is not None else _rule_of(raw, container, list(plain))
    prefixes = {}
    for encoder, choices in (("student", rule.student), ("teacher", rule.teacher)):
        found = next((prefix for prefix in choices if any(name.startswith(prefix) for name in plain)), None)
        if found is not None:
            prefixes[encoder] = found
    entries = [_sort(rule, prefixes, name, key, state[key]) for name, key in plain.items()]
    encoders: dict[str, dict[str, Entry]] = {encoder: {} for encoder in prefixes}
    for entry in entries:
        if entry.name:
            encoders[entry.encoder][entry.name] = entry
    entries += _others(raw, container)
    return Parsed(rule, tuple(entries), encoders, prefixes, _spare(entries, container, prefixes))


def _spare(entries: Sequence[Entry], container: str, prefixes: Mapping[str, str]) -> tuple[str, ...]:
    """What was taken, where the file has other backbones that no encoder is made of."""
    first = re.compile(r"(?:^|(?<=[./]))(?:layer1|4)\.0\.conv1\.weight$")
    places = [first.sub("", entry.key) for entry in entries if entry.use == "not used" and first.search(entry.key)]
    taken = " and ".join(f"{container}{'/' if container else ''}{prefix}" or "the top" for prefix in prefixes.values())
    return tuple(f"weights are taken from {taken}; there is another backbone under {place or 'the top'}" for place in places)


def unrecognised(raw: Raw) -> tuple[Entry, ...]:
    """All tensors of a file that no rule fits."""
    return tuple(Entry(place, tensor, "not used") for place, tensor in tensors_in(raw.tree, raw.path))


def _state_dict(raw: Raw) -> tuple[str, dict[str, Tensor]]:
    """The container that holds the weights, and its tensors; the file itself is the container ""."""
    if {"fingerprint", "method", "optimizer", "progress"} <= raw.tree.keys():
        choices = ["method"]
    else:
        choices = ["state_dict", "model", "network", ""]
    for container in choices:
        value = raw.tree.get(container) if container else raw.tree
        if isinstance(value, dict):
            state = {str(key): tensor for key, tensor in value.items() if isinstance(tensor, Tensor)}
            if state:
                return container, state
    return "", {}


def _others(raw: Raw, container: str) -> list[Entry]:
    """Tensors outside the state dict."""
    rest = {key: value for key, value in raw.tree.items() if key != container and (container or not isinstance(value, Tensor))}
    return [
        Entry(place, tensor, "optimizer" if place.startswith("optimizer") else "not used")
        for place, tensor in tensors_in(rest, raw.path)
    ]


def _bare(key: str) -> str:
    return re.sub(r"(?:^|(?<=\.))(?:module|_orig_mod)\.", "", key)


def _any(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _rule_of(raw: Raw, container: str, names: list[str]) -> Rule:
    for rule in RULES:
        if rule.container not in {"", container}:
            continue
        if all(any(re.search(mark, name) for name in names) for mark in rule.marks):
            return rule
    if not names:
        held = f"found {one_line(', '.join(list(raw.tree)[:6]))}" if raw.tree else "the file is empty"
        raise DataError(
            f"{raw.path}: no state dict under state_dict, model or network, nor at the top: {held}",
            "save model.state_dict() by itself or under one of these keys",
        )
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    raise DataError(
        f"{raw.path}: unknown layout: {len(names)} tensors ({shown})" + _foreign(names),
        "supported are ResNets with torchvision's names, bare or below encoder_q., backbone., encoder. and the like; rename the "
        "tensors to torchvision's names and save them with safetensors (docs/checkpoints.md)",
    )


def _foreign(names: list[str]) -> str:
    """What else the names look like."""
    signs = {
        r"\.shortcut\.": "lightly's own ResNet, whose exported form leaves out the ReLU behind the stem",
        r"(?:^|\.)features\.\d+\.": "an AlexNet, VGG or MobileNet",
        r"(?:^|\.)blocks\.\d+\.|cls_token|pos_embed": "a vision transformer",
        r"^(?:stem|stages)\.": "a ResNetV2, ConvNeXt or RegNet",
        r"^conv2d_\d+\.": "CompRess's SimCLR ResNet-50x4, with numbered layers",
    }
    for sign, words in signs.items():
        if any(re.search(sign, name) for name in names):
            return f"; this looks like {words}"
    return ""


def _sort(rule: Rule, prefixes: Mapping[str, str], name: str, key: str, tensor: Tensor) -> Entry:
    if _any(rule.outer_heads, name):
        owner = next((encoder for encoder in prefixes if name.startswith(f"{encoder}.")), "")
        return Entry(key, tensor, "head dropped", owner)
    for encoder, prefix in sorted(prefixes.items(), key=lambda item: -len(item[1])):
        if not name.startswith(prefix):
            continue
        inner = name[len(prefix) :]
        if _any(rule.inner_heads, inner):
            return Entry(key, tensor, "head dropped", encoder)
        if rule.indexed:
            first, dot, rest = inner.partition(".")
            inner = _INDEX.get(first, first) + dot + rest
        return Entry(key, tensor, "counter" if inner.endswith("num_batches_tracked") else "backbone", encoder, inner)
    return Entry(key, tensor, "bank" if _any(rule.banks, name) else "not used")
