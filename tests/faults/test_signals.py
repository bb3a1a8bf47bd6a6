"""Signals: what asks for a stop, what ends a process at once, and what a DVC that is gone means for its stage."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from isd_repro import cli
from isd_repro.evaluations import features
from isd_repro.runtime import signals
from isd_repro.runtime.errors import DataError, Preempted, UserError
from tests.faults import chain


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda number: number.name)
def test_each_signal_asks_for_a_stop(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may have shut SIGHUP off, as `nohup` does
    with signals.stop_on_signal() as stop:
        signal.raise_signal(number)
        assert stop.reason == number.name
    signal.signal(number, before)


@pytest.mark.parametrize(
    ("raised", "seen"), [(DataError("a file is damaged"), KeyboardInterrupt), (Preempted("stopped"), Preempted)]
)
def test_an_error_of_interrupted_code_is_the_interruption(raised: UserError, seen: type[BaseException]) -> None:
    def interrupted() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise raised from None

    with pytest.raises(seen), signals.interrupt_on_signal():
        interrupted()


def test_the_same_signal_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with signals.stop_on_signal() as stop:
        assert not stop()
        for moment in (100.0, 100.5):
            clock[0] = moment
            signal.raise_signal(signal.SIGTERM)
        assert (stop(), stop.reason) == (True, "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_same_signal_again_ends_the_process_at_once() -> None:
    code = (
        "import signal, time\nfrom isd_repro.runtime import signals\nsignals.INSIST = 0.0\n"
        "with signals.stop_on_signal() as stop:\n"
        "    signal.raise_signal(signal.SIGTERM)\n    print(stop.reason, flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM)\n    print('still here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "SIGTERM\n"), done.stderr


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_on_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("first", ["DVC has ended", "SIGTERM"])
def test_the_end_of_dvc_asks_for_a_stop(first: str) -> None:
    """A signal to DVC and its stage is one reason to stop, although the stage sees DVC die of it as well."""
    with signals.stop_on_signal() as stop, subprocess.Popen(["sleep", "100"]) as dvc:
        signals.follow(dvc.pid, "DVC has ended")
        if first == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)
        dvc.kill()
        until = time.monotonic() + 60
        while any(thread.name == "follow" for thread in threading.enumerate()):
            assert time.monotonic() < until
            time.sleep(0.01)
        assert stop.reason == first


def test_dvc_is_found_above_the_shell_that_it_starts() -> None:
    say = "import os; from isd_repro.runtime import signals; print(signals._dvc(), os.getpid())"
    shell = f"DVC_STAGE=it sh -c '{sys.executable} -c \"{say}\"; true'"
    with subprocess.Popen(["sh", "-c", f"{shell}; true"], stdout=subprocess.PIPE, text=True) as dvc:
        found, own = dvc.communicate()[0].split()
    assert int(found) == dvc.pid != int(own)


@pytest.mark.parametrize(("options", "promised"), [((), 75), (("--no-cache",), 130)], ids=["kept", "not kept"])
def test_an_evaluation_that_is_stopped_while_it_extracts(
    done: Path, options: tuple[str, ...], promised: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept decides whether it can go on."""
    real = features.require_finite

    def extracted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(features, "require_finite", extracted)
        result = chain.call(done, *chain.EVALUATE, *options)
    assert (result.code, "run the same command again" in result.err) == (promised, promised == 75), result
    assert list(done.glob(".state/features/once-*")) == []
    assert chain.call(done, *chain.EVALUATE, *options).code == 0


@pytest.mark.parametrize(("words", "code"), [("--version", 0), ("check nothing.yaml", 3)])
@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_a_command_that_has_ended_leaves_its_exit_code(
    number: signal.Signals, words: str, code: int, tmp_path: Path
) -> None:
    """Once torch is loaded, Python takes a second to end."""
    script = (
        f"import atexit, signal, sys\natexit.register(signal.raise_signal, {int(number)})\n"
        f"from isd_repro.__main__ import run\nsys.argv[1:] = {words.split()}\nrun()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == code, done


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the environment has no Triton")
def test_a_command_that_has_loaded_triton_ends_without_a_word(tmp_path: Path) -> None:
    """A training step loads it; at the end it reports what outlives Python."""
    script = "import sys, triton\nfrom isd_repro.__main__ import run\nsys.argv[1:] = ['--version']\nrun()\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_the_words_at_an_interrupt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_stage", lambda *_: signal.raise_signal(signal.SIGTERM))
    result = chain.call(folder, "knn", "isd")
    assert (result.code, result.err) == (130, "interrupted: finished outputs are kept, partial files were removed\n")
