"""Finds out what a pickle imports and contains without executing anything: every class and function is replaced by a stand-in.

The pickle is read by the pure-Python unpickler of the standard library, whose memory is bounded by the file's size; there is no
real object that it could call. `torch.load` runs only afterwards, and only if the pickle imports nothing but tensors, plain
values and the harmless classes below, for which it also gets stand-ins.
"""

from __future__ import annotations

import io
import pickle
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

_MAGIC = 0x1950A86A20F9469CFC6C  # begins the pickles of torch's old format: magic, protocol, machine, content, storages
_UNBOUNDED = (  # operations that take more memory than their bytes, or make numbers too long to print; torch.save uses none
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.LONG4),
)
_MODULE = {"_modules", "_parameters", "_buffers"}  # of a module that was pickled whole
_TUPLES = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
_MOST = 1_000_000  # values listed, or in a tuple at all its levels
_FILLED = r"collections\.defaultdict|(?:pytorch_)?lightning[\w.]*\.AttributeDict"  # which torch has to fill
_TORCH = re.compile(  # what `torch.load(weights_only=True)` knows itself, and argparse.Namespace
    r"argparse\.Namespace|collections\.(?:OrderedDict|Counter)|_codecs\.encode|builtins\.(?:bytearray|set|complex)"
    r"|torch\.\w+|torch\.(?:storage|cuda)\.\w+|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
)
_HARMLESS = re.compile(  # classes of plain values that trainers save with the weights
    r"numpy\.(?:_?core\.multiarray\.(?:scalar|_reconstruct)|dtype|ndarray|dtypes\.\w+)|pathlib\.\w+|datetime\.\w+"
    r"|builtins\.(?:dict|list|tuple|int|float|str|bool)|typing\.\w+|omegaconf\.[\w.]+|(?:pytorch_)?lightning[\w.]+|" + _FILLED
)


class Shaped(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: str


class Stand(dict[Any, Any]):
    """A stand-in for a class or function of a pickle, and for the result of calling it."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    state: Any = None

    def __init__(self, *_args: Any, **_options: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, items: Any) -> None:
        """Ignore an item; subclasses of list are filled by this method."""

    extend = append


class _AsDict:
    """Creates a dict that torch may fill."""

    def __new__(cls, *_args: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


def _shaped(storage: Any, _: Any, shape: Any, *_rest: Any) -> Shaped:
    """The tensor of a storage from `persistent_load`; other values are not printed, because they may be recursive."""
    sides = tuple(side for side in shape if isinstance(side, int))
    return Shaped(sides, storage if isinstance(storage, str) else "")


def _weighed(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """The operation that makes a tuple, followed by `weigh`; hashing deeply nested tuples could take exponential time."""

    def load_and_weigh(unpickler: Any) -> None:
        load(unpickler)
        unpickler.weigh(unpickler.stack[-1])

    return load_and_weigh


class Outline(pickle._Unpickler):  # noqa: SLF001
    """The pickles of one file, read without executing anything.

    Attributes:
        content: the saved object, of dicts, lists, `Shaped` and `Stand`.
        problem: why the file must not be loaded; empty if it may.
    """

    dispatch = {  # noqa: RUF012
        code: _weighed(load) if bytes([code]) in _TUPLES else load
        for code, load in pickle._Unpickler.dispatch.items()  # noqa: SLF001
        if bytes([code]) not in _UNBOUNDED
    }

    def __init__(self, payload: bytes, size: int) -> None:
        """Take `payload`, which begins with a pickle; `size` is the size of the whole file in bytes."""
        self._size = size
        self._stands: dict[str, Any] = {}
        self._weights: dict[int, tuple[int, tuple[Any, ...]]] = {}  # id of a tuple -> values at all its levels, the tuple
        self.content: Any = None
        self.problem = ""
        file = io.BytesIO(payload)
        for position in range(5):
            super().__init__(file, encoding="latin1")
            found = self.load()
            if position in {0, 3}:
                self.content = found
            if position == 0 and found != _MAGIC:
                break

    @property
    def stands(self) -> list[Any]:
        """Stand-ins for everything that torch does not know, in the form that `torch.serialization.safe_globals` accepts."""
        mine = {name: stand for name, stand in self._stands.items() if not _TORCH.fullmatch(name)}
        return [(_AsDict if re.fullmatch(_FILLED, name) else stand, name) for name, stand in mine.items()]

    def tensors(self) -> Iterator[tuple[str, Shaped]]:
        """Every tensor with its place in the content, if it can be determined."""
        stack, seen = [("", self.content)], set[int]()
        while stack and len(seen) < _MOST:
            place, value = stack.pop()
            if isinstance(value, Shaped):
                yield place, value
            elif isinstance(value, dict | list | tuple) and id(value) not in seen:
                seen.add(id(value))
                items = list(value.items() if isinstance(value, dict) else enumerate(value))
                inside = [(place if key in _MODULE else f"{place}/{key}".lstrip("/"), each) for key, each in items]
                stack += reversed([*inside, (place, value.state)] if isinstance(value, Stand) else inside)

    def weigh(self, made: tuple[Any, ...]) -> None:
        """Count the values of a new tuple at all levels; `UnpicklingError` if there are more than any checkpoint has."""
        weight = sum(self._weights[id(item)][0] if id(item) in self._weights else 1 for item in made)
        if weight > _MOST:
            raise pickle.UnpicklingError(f"a tuple of more than {_MOST:,} values")
        self._weights[id(made)] = weight, made

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in and note whether the object may be loaded."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # Python 2's names
        full = f"{module}.{name}"
        if full in self._stands:
            return self._stands[full]
        if not _TORCH.fullmatch(full) and not _HARMLESS.fullmatch(full):
            self.problem = self.problem or f"the pickle asks for {full}"
        stand: Any = type(name, (Stand,), {"__new__": lambda cls, *args, **options: self._called(full, cls, args)})
        if full.startswith("torch._utils._rebuild_tensor"):
            stand = _shaped
        elif full.startswith("torch._utils._rebuild_parameter"):
            stand = lambda tensor, *rest: tensor  # noqa: E731
        elif full == "torch._tensor._rebuild_from_type_v2":
            stand = lambda rebuild, kind, args, state: rebuild(*args)  # noqa: E731
        self._stands[full] = stand
        return stand

    def persistent_load(self, pid: Any) -> str:
        """Represent a storage by the name of its type."""
        words = list(pid) if isinstance(pid, tuple) else []
        if len(words) > 4 and isinstance(words[4], int) and words[4] > self._size:
            self.problem = self.problem or f"it announces {words[4]:,} values in a file of {self._size:,} bytes"
        kind = getattr(words[1], "__name__", "") if len(words) > 1 else ""
        return str(getattr(torch, kind.removesuffix("Storage").lower(), kind)).removeprefix("torch.")

    def _called(self, full: str, cls: type[Stand], args: tuple[Any, ...]) -> Stand:
        """The stand-in for the result of a call; calls that could take much memory or time are noted as a problem."""
        codec = full in {"_codecs.encode", "builtins.bytearray"} and len(args) > 1 and args[1] not in {"latin1", "latin-1"}
        sized = full == "builtins.bytearray" and len(args) == 1 and isinstance(args[0], int)
        if codec or sized or re.fullmatch(r"torch\.(?:\w+\.)?\w*(?:Storage|Tensor)", full):
            self.problem = self.problem or f"the pickle calls {full}, which torch.save never writes in this way"
        return dict.__new__(cls)
