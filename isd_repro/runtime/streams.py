"""Standard streams for long runs: they always exist, and a failed write cannot stop the run."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


_PLAIN = {"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{PLUS-MINUS SIGN}": "+/-", "\N{MULTIPLICATION SIGN}": "x"}


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    """Replacements for characters that a stream's encoding lacks (`LANG=C`, `PYTHONIOENCODING=gbk`)."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(each, each.encode("unicode_escape").decode("ascii")) for each in text), error.end


codecs.register_error("plain", _in_plain_characters)


class _Careful(io.FileIO):
    """A standard stream that, once it cannot be written, discards its input instead of raising an error.

    Standard error does so after any failure, because a log on a full disk must not end a run of days. Standard output does so
    only if its reader is gone (`show | head -1`, `verify | grep -q`): the command continues and ends with its own exit code.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)

    def write(self, content: ReadableBuffer, /) -> int:
        try:
            while (written := super().write(content)) is None:  # it does not block, and is full
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                raise
            drop(self.fileno())
            return len(memoryview(content).cast("B"))


def careful() -> None:
    """Replace the process's own standard streams; streams that a caller has substituted are kept.

    A process that was started without standard streams (`>&-`, some schedulers) gets streams that discard everything. Otherwise
    the next file to be opened would get their number, and messages of libraries on standard error would be written into it.
    """
    if sys.platform == "win32":  # where a console takes other calls than a file
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="plain")
        return
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(1, sys.stdout.encoding if sys.stdout else "utf-8")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(2, sys.stderr.encoding if sys.stderr else "utf-8")


def _text(number: int, encoding: str) -> io.TextIOWrapper:
    raw = _Careful(number)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "plain", line_buffering=number == 2 or raw.isatty())


def drop(number: int) -> None:
    """Discard everything that is written to a stream from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
