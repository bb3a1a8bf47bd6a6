"""Values that YAML can hold and a run cannot: each one is named with its line, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from isd_repro import cli
from isd_repro.config import reader as config
from isd_repro.config.layout import state_root
from isd_repro.runtime.errors import EXIT_FAILURE, ConfigError, DataError

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "params.yaml").read_text("utf-8")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("lr: 0.03", "lr: .inf", "finite"),
        ("- 0.13", "- .nan", "finite"),
        ("numerics: {seed: 0", "numerics: {seed: 18446744073709551616", "less than"),
        ("knn: {k: [1, 20]}", "knn: {k: []}", "at least 1 item"),
        ("knn: {k: [1, 20]}", "knn: {k: [1, 20, 1]}", "evaluation.knn.k: 1 is listed twice"),
        ("linear_runs:\n", "linear_runs:\n- isd\n", "linear_runs: 'isd' is listed twice"),
        ("store: {channels: 1}", "store: {channels: 3}", "its subset has 3-channel images"),
        ("root: .", "root: /tmp", "root: '/tmp' is absolute"),
        ("  isd:\n", "  isd-t0.1:\n", "pattern"),
        ("title: ", "title: !tag ", "not YAML"),
    ],
)
def test_a_value_out_of_range_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in TEXT
    file = tmp_path / "params.yaml"
    file.write_text(TEXT.replace(old, new), "utf-8")
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert str(file) in caught.value.message
    assert words in caught.value.message


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(b"profile: d\xff\n")
    with pytest.raises(ConfigError, match="not YAML in UTF-8"):
        config.load(file)


def test_a_system_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A file where a folder must be: the path and the reason, exit code 1, no traceback."""
    (tmp_path / "params.yaml").write_text(TEXT, "utf-8")
    (tmp_path / "reports").write_text("in the way", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["isd-repro", "report"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == EXIT_FAILURE
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "reports" in message
    assert "Traceback" not in message


def test_a_relative_folder_for_the_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC runs a stage in the profile's folder, where it would be another one."""
    monkeypatch.setenv("ISD_STATE_ROOT", "state")
    with pytest.raises(DataError, match="ISD_STATE_ROOT=state is a relative path"):
        state_root()
