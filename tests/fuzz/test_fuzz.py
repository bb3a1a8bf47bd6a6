"""Changed files, by the thousand: each is read as what it says or refused with its exit code; nothing crashes, hangs or swells.

In the normal suite some dozens of seeded changes a parser; in the slow one as many as fit into `ISD_FUZZ_SECONDS` (20) for
each parser of parameters, manifests and checkpoints, and a third of that for the others.
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
    "encoder", "encoders", "features", "our checkpoint", "torch checkpoint", "legacy checkpoint", "header",
    "old encoder", "old checkpoint",
)  # fmt: skip
LONG = {"params", "manifest.json", "images.tsv", "encoder", "our checkpoint", "torch checkpoint", "legacy checkpoint"}
SECONDS = float(os.environ.get("ISD_FUZZ_SECONDS", "20"))
SEED = os.environ.get("ISD_FUZZ_SEED", "0")  # read here: the tests themselves run without such variables
HANG = 30  # seconds of one input; a valid one takes a hundredth
GROWTH = 400 * 1024  # KiB that thousands of inputs of some kilobytes may add to the highest memory
NORMAL, LEAST = 20, 100


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


def fuzz(target: Target, name: str, *, least: int, most: int, seconds: float) -> tuple[int, int]:
    """Try changes until either limit, but so many however slow the machine; the number tried and the number refused."""
    whole = target.file.read_bytes()
    value = target.read()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tried = refused = 0
    end = time.monotonic() + seconds
    for content in mutations(whole, random.Random(f"{name} {SEED}")):
        if tried == most or (tried >= least and time.monotonic() > end):
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
    tried, refused = fuzz(made[name], name, least=NORMAL, most=NORMAL, seconds=60)
    assert tried == NORMAL
    assert refused >= 3, "changes that nobody minds try nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_changes_for_a_minute(name: str, made: dict[str, Target], capsys: pytest.CaptureFixture[str]) -> None:
    tried, refused = fuzz(made[name], name, least=LEAST, most=10**9, seconds=SECONDS if name in LONG else SECONDS / 3)
    with capsys.disabled():
        print(f"\n{name}: {tried} changed files, {refused} refused")
    assert refused > tried // 20


# --- bytes that are no change of anything -------------------------------------------------------------------------------


QUICK = settings(
    max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MANY = settings(QUICK, max_examples=300)
TEXT = st.text(alphabet=st.sampled_from("ab01 \n\t:-[]{}&*!'\"<>|#%.,/\\\0é\u202e"), max_size=200)
HEADS = (
    b"",
    b"PK\x03\x04",
    b"\x80\x02",
    b"\x10\0\0\0\0\0\0\0{",
    b"\x93NUMPY\x01\0",
    b"class names : \n",
    b"split\tclass\tfile\tsha256\troles\n",
    b"{",
    b"a: ",
)
CONTENT = st.one_of(
    st.binary(max_size=300),
    TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.tuples(st.sampled_from(HEADS), st.binary(max_size=200)).map(b"".join),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
        max_leaves=20,
    ).map(lambda tree: json.dumps(tree).encode()),
)


def any_bytes(made: dict[str, Target], content: bytes) -> None:
    for name, target in made.items():
        whole = target.file.read_bytes()
        try:
            with alarm():
                refused = attempt(target, content, None if not target.hashed else targets.Unsound)
            assert refused or name == "metrics", f"{name} read {content!r}"
        finally:
            target.file.write_bytes(whole)


@given(content=CONTENT)
@QUICK
def test_any_bytes_are_refused(made: dict[str, Target], content: bytes) -> None:
    any_bytes(made, content)


@pytest.mark.slow
@given(content=CONTENT)
@MANY
def test_any_bytes_at_length(made: dict[str, Target], content: bytes) -> None:
    any_bytes(made, content)


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
    complete = text[:cut].count(b"\n")
    found = metrics._rows(path)
    assert len(found) == complete
    for row, original in zip(found, rows, strict=False):
        for key, value in original.items():
            assert row[key] == value or (row[key] is None and key in row["not_finite"])
