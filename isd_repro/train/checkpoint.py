"""Training checkpoints, and with them the code and arithmetic that trained a run and the list of attempts.

Batches are a pure function of (seed, step), so the step stands for every generator. The checkpoint before the newest is kept,
and is used where the newest is damaged. A file that a crash left empty or torn is put aside, with a word, and stops no run.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.optim import Optimizer

from isd_repro.config.fields import Natural
from isd_repro.records import Attempt
from isd_repro.runtime import ranks
from isd_repro.runtime.archives import check_zip
from isd_repro.runtime.errors import DataError, Preempted, UserError
from isd_repro.runtime.files import put_aside, write_atomic
from isd_repro.train import monitor

Say = Callable[[str], object]

# --- checkpoints ----------------------------------------------------------------------------------------------------------

_KEYS = {"fingerprint", "method", "optimizer", "progress"}
_FIRST_FIELDS = {"step", "sums", "curve", "sources", "seconds"}  # of `RunProgress`; later versions added the others


def _scalar(value: Tensor) -> Tensor:
    if value.shape:
        raise ValueError("not a scalar")
    return value


@dataclass(config=ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True))
class RunProgress:
    """The progress of a run."""

    step: Natural = 0
    sums: dict[str, Annotated[Tensor, AfterValidator(_scalar)]] = field(default_factory=dict)  # of the epoch's metrics so far
    curve: list[dict[str, float]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # source hashes of the processes that trained
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    code: dict[str, str] = field(default_factory=dict)  # see `code_of`, of the last process
    remarks: list[str] = field(default_factory=list)  # warnings for the record


class Damaged(Exception):
    """A checkpoint cannot be used; the message says why."""


def previous(path: Path) -> Path:
    """Path of the previous checkpoint."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save(path: Path, fingerprint: str, method: nn.Module, optimizer: Optimizer, progress: RunProgress) -> None:
    """Write a checkpoint and keep the one before it; a reader never sees a part of it."""
    write_atomic(path, dump(fingerprint, method, optimizer, progress), keep=previous(path))


def dump(fingerprint: str, method: nn.Module, optimizer: Optimizer, progress: RunProgress) -> bytes:
    """The content of a checkpoint."""
    buffer = io.BytesIO()
    state = {
        "fingerprint": fingerprint,
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
    }
    torch.save(state, buffer)
    return buffer.getvalue()


def load(
    path: Path,
    fingerprint: str,
    method: nn.Module,
    optimizer: Optimizer,
    device: torch.device,
    say: Say = lambda line: None,
) -> RunProgress:
    """Restore the newest usable checkpoint in place and return its progress; a fresh `RunProgress` where there is none.

    Args:
        path: the newest; the one before it is beside it.
        fingerprint: of the run.
        method: takes the state.
        optimizer: takes the state.
        device: where both are.
        say: takes a line where the newest was damaged; it is then put aside, so that no later save overwrites it.

    Raises:
        DataError: every checkpoint is damaged, or the newest belongs to another configuration. No file is touched.
    """
    damaged: list[str] = []
    for place in (path, previous(path)):
        if not place.is_file():
            continue
        try:
            progress = take(place, fingerprint, method, optimizer, device)
        except Damaged as error:
            damaged.append(f"{place}: damaged checkpoint ({error})")
            continue
        if damaged:
            aside = put_aside(path)
            say(f"{damaged[0]}; it is kept as {aside.name}, and the previous one, of step {progress.step}, is used")
        return progress
    if damaged:
        raise DataError("; ".join(damaged), f"delete {'them' if len(damaged) > 1 else 'it'} to restart this run")
    return RunProgress()


def take(source: Path | bytes, fingerprint: str, method: nn.Module, optimizer: Optimizer, device: torch.device) -> RunProgress:
    """Restore a file that `save` wrote, or what `dump` gave.

    Raises:
        Damaged: it cannot be read, or does not fit.
        DataError: it belongs to another configuration.
    """
    state = _read(source)
    if not isinstance(state, Mapping) or not set(state) >= _KEYS:
        lacking = ", ".join(sorted(_KEYS - set(state))) if isinstance(state, Mapping) else f"it is a {type(state).__name__}"
        raise Damaged(f"not all parts are there: {lacking}")
    if state["fingerprint"] != fingerprint:
        where = source if isinstance(source, Path) else "state"
        found = f"{where}: belongs to configuration {state['fingerprint']}, not {fingerprint}"
        raise DataError(found, "delete it to restart this run")
    try:
        progress = _progress(state["progress"], device)
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
    except ValidationError as error:
        raise Damaged(f"progress: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise Damaged(" ".join(line.strip() for line in text[:3])) from error
    _check_optimizer(optimizer)
    if not monitor.is_finite(method):
        raise Damaged("weights or buffers that are not finite")
    return progress


def _read(source: Path | bytes) -> Any:
    """What `torch.save` wrote; on the CPU, so that a full device is not taken for a damaged file."""
    file: Path | io.BytesIO = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        check_zip(file)
        if isinstance(file, io.BytesIO):
            file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno is not None:  # the disk, not the content
            raise
        raise Damaged(str(error)) from error
    except (pickle.UnpicklingError, MemoryError, RecursionError) as error:
        raise Damaged(f"not readable: {type(error).__name__} {error}"[:300]) from error
    except Exception as error:  # zip and pickle readers raise almost anything on bytes that are not theirs
        raise Damaged(str(error) or type(error).__name__) from error


def _progress(raw: Any, device: torch.device) -> RunProgress:
    if not isinstance(raw, dict) or not set(raw) >= _FIRST_FIELDS:
        found = ", ".join(sorted(map(str, raw))) if isinstance(raw, dict) else type(raw).__name__
        raise Damaged(f"progress holds {found}")
    progress = RunProgress(**raw)
    progress.sums = {name: value.to(device) for name, value in progress.sums.items()}
    return progress


def _check_optimizer(optimizer: Optimizer) -> None:
    """An optimizer itself takes momenta of any shape."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    raise Damaged(f"optimizer: {name} of shape {tuple(value.shape)} for a weight of {tuple(parameter.shape)}")


def share(
    fingerprint: str, method: nn.Module, optimizer: Optimizer, progress: RunProgress, now: Mapping[str, str]
) -> RunProgress:
    """Give every rank rank 0's state, and return its progress.

    Args:
        fingerprint: of the run, as this rank sees it.
        method: takes the state.
        optimizer: takes the state.
        progress: that of rank 0; what the others give is ignored.
        now: this rank's code, see `code_of`.

    Raises:
        UserError: this rank works with other parameters, images, code or arithmetic than rank 0.
    """
    if ranks.world() == 1:
        return progress
    mine = ranks.rank() == 0
    content = ranks.from_first(dump(fingerprint, method, optimizer, progress) if mine else b"")
    if mine:
        return progress
    advice = "use the same checkout, packages, parameters, images and number of threads on every machine"
    try:
        found = take(content, fingerprint, method, optimizer, next(method.parameters()).device)
    except (Damaged, DataError) as error:
        raise UserError(f"rank {ranks.rank()} does not train the same run as rank 0 ({error})", advice) from error
    if found.code != now:
        raise UserError(f"rank {ranks.rank()} has different code from rank 0: {', '.join(_changed(found.code, now))}", advice)
    return found


# --- the code and arithmetic that trained a run -------------------------------------------------------------------------------

ANYWAY = "ISD_RESUME_CHANGED"  # environment variable; 1 resumes under changed code or arithmetic

_PACKAGE = Path(__file__).parents[1]
_FIXED = ("data/augment.py", "data/loader.py", "runtime/ranks.py", "train/lars.py", "train/loop.py", "train/schedule.py")


def code_of(method: str, device: torch.device) -> dict[str, str]:
    """Short sha256 by file of what a step's numbers are computed with; the version of torch; on a CPU how it adds.

    A sum over several threads, or by other vector units, is rounded in another order: `cpu` names both. Files that only read,
    write, check and stop are left out: a better message must not end a run of days.
    """
    files = [_PACKAGE / name for name in (*_FIXED, f"methods/{method}.py")] + list((_PACKAGE / "nn").glob("*.py"))
    found = {path.relative_to(_PACKAGE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in sorted(files)}
    found["torch"] = str(torch.__version__)  # a plain string: its own type is none that a checkpoint may hold
    return found | ({"cpu": arithmetic()} if device.type == "cpu" else {})


def arithmetic() -> str:
    """Vector units and threads that this process computes with on the CPU."""
    threads = torch.get_num_threads()
    return f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''}"


def take_over(progress: RunProgress, now: Mapping[str, str], state: Path) -> None:
    """Note the code and arithmetic that train from here on.

    Raises:
        UserError: they are not those of the checkpoint, and `ISD_RESUME_CHANGED=1` does not allow it.
    """
    before = progress.code
    names = _changed(before, now) if progress.step else []
    if names:
        changes = "; ".join(f"{name} was {before.get(name, 'absent')}, is {now.get(name, 'absent')}" for name in names)
        what = "arithmetic" if names == ["cpu"] else "code"
        restore = (
            "train on the same kind of CPU with as many threads (OMP_NUM_THREADS)"
            if names == ["cpu"]
            else "restore the earlier code"
        )
        if os.environ.get(ANYWAY) != "1":
            raise UserError(
                f"{state}: this run was trained up to step {progress.step} with different {what}: {changes}",
                f"{restore}; or delete the folder to restart; or set {ANYWAY}=1 to resume anyway, which the record notes",
            )
        progress.remarks.append(f"resumed after step {progress.step} with different {what} ({changes})")
    progress.code = dict(now)


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


# --- attempts ---------------------------------------------------------------------------------------------------------------

_ATTEMPTS = TypeAdapter(tuple[Attempt, ...])


class Attempts:
    """Every process that worked on a run, in a file that is written anew at the start, at each checkpoint and at the end.

    Until a process says how it ended it counts as killed, at its last checkpoint.
    """

    def __init__(self, path: Path, progress: RunProgress, device: str, say: Say = lambda line: None) -> None:
        """Begin this process's attempt; `device` is what it computes on, in words.

        A file that cannot be read is put aside: `say` takes a line, and the progress a remark for the record.
        """
        self._path, self._progress, self._device = path, progress, device
        self._first, self._started, self._began = progress.step, datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        self._before: tuple[Attempt, ...] = ()
        try:
            self._before = _ATTEMPTS.validate_json(path.read_bytes()) if path.is_file() else ()
        except ValidationError as error:
            say(f"{path}: damaged ({error.errors()[0]['msg']}); it is kept as {put_aside(path).name}, and a new list is started")
            progress.remarks.append(f"attempts before step {progress.step} are not listed: their file was damaged")
        self.note()

    def so_far(self, outcome: Literal["finished", "stopped", "failed", "killed"]) -> tuple[Attempt, ...]:
        """All attempts, this one as if it ended now."""
        this = Attempt(
            started=self._started,
            seconds=round(time.monotonic() - self._began, 3),
            first_step=self._first,
            last_step=self._progress.step,
            outcome=outcome,
            device=self._device,
        )
        return (*self._before, this)

    def note(self, outcome: Literal["finished", "stopped", "failed", "killed"] = "killed") -> None:
        """Write how the attempt ends, or that a checkpoint was written."""
        write_atomic(self._path, _ATTEMPTS.dump_json(self.so_far(outcome), indent=1) + b"\n")


@contextmanager
def attempt(path: Path, progress: RunProgress, device: str, say: Say = lambda line: None) -> Iterator[Attempts]:
    """Within the block this process is the run's newest attempt; how the block ends is how the attempt ends."""
    attempts = Attempts(path, progress, device, say)
    try:
        yield attempts
    except BaseException as error:
        with suppress(OSError):  # what went wrong is what the user must see
            attempts.note("stopped" if isinstance(error, Preempted | KeyboardInterrupt) else "failed")
        raise
    attempts.note("finished")
