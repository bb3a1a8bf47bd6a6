"""Changed files, by the thousand: each is read as what it says or refused with its exit code; nothing crashes, hangs or swells.

In the normal suite some dozens of seeded changes a parser; in the slow one as many as fit into `ISD_FUZZ_SECONDS` (5).
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isd_repro.tracking import metrics
from tests.fuzz import targets
from tests.fuzz.targets import Target, attempt, mutations

NAMES = (
    "params", "manifest.json", "images.tsv", "store.npy", "list", "pretrain record", "knn record", "external record", "metrics",
    "encoder", "features", "our checkpoint", "torch checkpoint", "legacy checkpoint", "header", "old encoder",
)  # fmt: skip
SECONDS = float(os.environ.get("ISD_FUZZ_SECONDS", "5"))
SEED = os.environ.get("ISD_FUZZ_SEED", "0")  # read here: the tests themselves run without such variables
HANG = 30  # seconds of one input; a valid one takes a hundredth
GROWTH = 400 * 1024  # KiB that thousands of inputs of some kilobytes may add to the highest memory
NORMAL = 15


@contextmanager
def alarm() -> Iterator[None]:
    """A read that hangs is an error of the test."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"one input took more than {HANG} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(target: Target, name: str, seconds: float) -> tuple[int, int]:
    """Try changes for so long, but no fewer than the normal number; the number tried and the number refused."""
    whole, value = target.file.read_bytes(), target.read()
    memory, end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() + seconds
    tried = refused = 0
    for content in mutations(whole, random.Random(f"{name} {SEED}")):
        if tried >= NORMAL and time.monotonic() > end:
            break
        with alarm():
            refused += attempt(target, content, value)
        tried += 1
    target.file.write_bytes(whole)
    assert target.read() == value
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < GROWTH, f"{grown} KiB more than before"
    return tried, refused


def test_every_target_is_known(made: dict[str, Target]) -> None:
    assert set(made) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_some_changes(name: str, made: dict[str, Target]) -> None:
    assert fuzz(made[name], name, 0)[1] >= 2, "changes that nobody minds try nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_changes_at_length(name: str, made: dict[str, Target], capsys: pytest.CaptureFixture[str]) -> None:
    tried, refused = fuzz(made[name], name, SECONDS)
    with capsys.disabled():
        print(f"\n{name}: {tried} changed files, {refused} refused")
    assert refused > tried // 20


# --- bytes that are no change of anything -------------------------------------------------------------------------------

QUICK = settings(
    max_examples=20, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(alphabet=st.sampled_from("ab01 \n\t:-[]{}&*!'\"<>|#%.,/\\\0é\u202e"), max_size=200)
HEADS = (
    b"PK\x03\x04",
    b"\x80\x02",
    b"\x10\0\0\0\0\0\0\0{",
    b"\x93NUMPY\x01\0",
    b"class names : \n",
    b"split\tclass\tfile\tsha256\troles\n",
)
CONTENT = st.one_of(
    TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.tuples(st.sampled_from((b"", *HEADS)), st.binary(max_size=200)).map(b"".join),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
        max_leaves=20,
    ).map(lambda tree: json.dumps(tree).encode()),
)


@given(content=CONTENT)
@QUICK
def test_any_bytes_are_refused(made: dict[str, Target], content: bytes) -> None:
    for name, target in made.items():
        whole = target.file.read_bytes()
        try:
            with alarm():
                refused = attempt(target, content, None if not target.hashed else targets.Unsound)
            assert refused or name == "metrics", f"{name} read {content!r}"
        finally:
            target.file.write_bytes(whole)


@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["epoch", "step", "loss", "x"]), st.floats() | st.integers(-5, 5)), max_size=8),
    cut=st.integers(0, 300),
)
@settings(QUICK, max_examples=100)
def test_metrics_survive_any_cut(made: dict[str, Target], rows: list[dict[str, float]], cut: int) -> None:
    """What was written before the cut is read back; a torn line is dropped."""
    path = made["metrics"].file
    text = "".join(metrics.line(row) for row in rows).encode()
    path.write_bytes(text[:cut])
    found = metrics._rows(path)
    assert len(found) == text[:cut].count(b"\n")
    for row, original in zip(found, rows, strict=False):
        for key, value in original.items():
            assert row[key] == value or (row[key] is None and key in row["not_finite"])
