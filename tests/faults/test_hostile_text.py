"""Parameters that cannot be read, and words that a page, a table, a spreadsheet or a terminal would obey."""

from __future__ import annotations

import base64
import csv
import json
import re
import resource
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from isd_repro.config import reader as config
from isd_repro.records import EvaluationRecord, ExternalRecord, read_record, unpack_labels, write_record
from isd_repro.report import text
from isd_repro.runtime.errors import DataError, printable
from tests.faults import chain, world
from tests.report import synthetic
from tests.report.conftest import Profile, make

EPOCHS = "\n      epochs: 3"  # of the run


def wrong(tmp_path: Path, content: str | bytes, *words: str) -> str:
    path = tmp_path / "params.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    result = chain.call(tmp_path, "check", "params.yaml")
    chain.refused(result, "params.yaml", *words, code=3)
    assert len(result.err) < 20_000
    return result.err


UNREADABLE = {
    "many wrong keys": (world.PARAMS + "".join(f"k{n}: 1\n" for n in range(2_000)), "and 1950 more"),
    "a number of many digits": (world.PARAMS.replace(EPOCHS, f"{EPOCHS[:-1]}" + "9" * 5000), "cannot be parsed"),
    "a date that is none": (world.PARAMS.replace(EPOCHS, f"{EPOCHS[:-1]}2001-99-99"), "params.yaml:1"),
    "a tag that runs code": (
        world.PARAMS.replace(EPOCHS, EPOCHS[:-1] + '!!python/object/apply:os.system ["touch it-ran"]'),
        "not YAML",
    ),
    "bytes": (world.PARAMS.replace("label: ISD", "label: !!binary aGk="), "runs.isd.label"),
    "a date": (world.PARAMS.replace("label: ISD", "label: 2001-01-01"), "runs.isd.label"),
    "a key twice": (world.PARAMS.replace(EPOCHS, f"{EPOCHS[:-1]}3\n      epochs: 4"), "epochs"),
    "two documents": (world.PARAMS + "---\n" + world.PARAMS, "params.yaml"),
    "a null byte": (world.PARAMS.replace("label: ISD", 'label: "a\\0b"'), "contains invisible characters"),
    "a terminal's command": (world.PARAMS.replace("label: ISD", 'label: "\\e]0;x\\a"'), "runs.isd.label"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_parameters_that_cannot_be_read(kind: str, tmp_path: Path) -> None:
    said = wrong(tmp_path, *UNREADABLE[kind])
    assert all(sign == "\n" or sign.isprintable() for sign in said)
    assert not list(tmp_path.rglob("it-ran"))


STRICT = {
    "epochs: true": ("epochs: 3", "runs.isd.optim.epochs", "valid integer (got True)"),
    'epochs: "5"': ("epochs: 3", "runs.isd.optim.epochs", "valid integer (got '5')"),
    "epochs: 3.0": ("epochs: 3", "runs.isd.optim.epochs", "valid integer (got 3.0)"),
    "label: 5": ("label: ISD", "runs.isd.label", "valid string"),
    "mean: [true]": ("mean: [0.13]", "runs.isd.data.mean", "valid number (got True)"),
    'bank_size: "32"': ("bank_size: 32", "runs.isd.method.bank_size", "valid integer"),
    "image_size: 1000000": ("image_size: 20", "runs.isd.data.image_size", "less than or equal to 4096"),
    "batch_size: 10000000000": ("batch_size: 16", "runs.isd.optim.batch_size", "less than 2147483648"),
}


@pytest.mark.parametrize("new", STRICT)
def test_a_value_of_another_type_is_not_bent_into_one(new: str, tmp_path: Path) -> None:
    old, key, says = STRICT[new]
    old, new = (EPOCHS, f"{EPOCHS[:-9]}{new}") if old == "epochs: 3" else (old, new)
    assert world.PARAMS.count(old) == 1
    changed = world.PARAMS.replace(old, new)
    line = changed[: changed.index(new) + len(new)].count("\n") + 1
    wrong(tmp_path, changed, f"params.yaml:{line} {key}", says)


def test_the_key_of_a_list_is_whole(tmp_path: Path) -> None:
    """A rule's tag and one of its keys have one name."""
    changed = world.PARAMS.replace("{name: balanced, per_class: 8, seed: 0}", "{name: list, list: D99}")
    line = changed[: changed.index("{name: list")].count("\n") + 1
    wrong(tmp_path, changed, f"params.yaml:{line} subsets.digits.rule.list: ")


@pytest.mark.parametrize("size", ["bank_size: 2000000000", "batch_size: 2000000000"])
def test_sizes_beyond_any_memory(size: str, done: Path) -> None:
    """What passes every range ends in one message, and not in a traceback of an allocator."""
    old = "bank_size: 32" if size.startswith("bank") else "batch_size: 16"
    world.edit(done, (old, size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "_SHOWN", 200)
        result = chain.call(done, "pretrain", "isd")
    assert result.code in {1, 3}, result
    assert "Traceback" not in result.err
    assert "error: " in result.err


def test_an_allocator_error_is_one_line(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch on the CPU, of torch on a GPU, and of Python; any other RuntimeError stays a defect of ours."""
    for error in (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("can't start new thread"),
        MemoryError(),
    ):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("isd_repro.evaluations.stage.run_evaluation", fail)
        chain.refused(chain.call(done, "knn", "isd"), "error: not enough memory", code=1)

    def defect(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("isd_repro.evaluations.stage.run_evaluation", defect)
    with pytest.raises(RuntimeError, match="shapes"):
        chain.call(done, "knn", "isd")


# --- words that programs obey -------------------------------------------------------------------------------------------

EVIL = [
    "<script>alert(1)</script>",
    "\"' onmouseover='alert(1)",
    "{{ 7*7 }}<% 7*7 %><< 7*7 >>",
    "\\input{/etc/passwd}\\write18{id}",
    "[3cm] & \\\\ % $x_1^2$ ~#",
    "![x](http://evil.example/x.png) [y](javascript:alert(1))",
    "@SUM(1+1)*cmd|' /C calc'!A0",
]


class Tags(HTMLParser):
    """Elements and event handlers of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


def tags(html: str) -> list[tuple[str, tuple[str, ...]]]:
    reader = Tags()
    reader.feed(html)
    return reader.found


def with_words(tmp_path: Path, words: str) -> Profile:
    """A profile, its records and an evaluated checkpoint that say these words wherever they can."""
    profile = make(tmp_path)
    runs = {
        name: run.model_copy(update={"label": f"{words}{name}", "notes": (words,)}) for name, run in profile.params.runs.items()
    }
    report = profile.params.report.model_copy(update={"title": words, "caption": words, "notes": (words,)})
    params = profile.params.model_copy(update={"runs": runs, "report": report})
    folder = profile.layout.records / "evil"
    part = read_record(profile.layout.record("isd", "knn"), EvaluationRecord)
    part = part.model_copy(update={"run": "evil", "protocol": words})
    record = ExternalRecord(
        name="evil", label=words, file=words, sha256=part.encoder_sha256, layout=words, arch=words, teacher_bn="own",
        transform={words: words}, command=words, evaluations=(part,), provenance=synthetic.provenance(),
    )  # fmt: skip
    write_record(folder / "external.json", record)
    return Profile(params, profile.layout)


@pytest.mark.parametrize("words", EVIL)
def test_words_stay_words(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every format with these words has the structure that it has with plain ones."""
    evil, plain = with_words(tmp_path / "evil", words), with_words(tmp_path / "plain", "plain")
    found, wanted = evil.files(), plain.files()
    assert set(found) == set(wanted)
    assert tags(found["index.html"]) == tags(wanted["index.html"])
    for name in found:
        if name.endswith(".svg"):
            assert [node.tag for node in ET.fromstring(found[name]).iter()] == [
                node.tag for node in ET.fromstring(wanted[name]).iter()
            ]
    assert "49" not in re.sub(r"[0-9]*49[0-9.]*", "", found["index.html"]) or "7*7" in found["index.html"]
    assert latex_commands(found["table.tex"]) <= latex_commands(wanted["table.tex"]) | set(ESCAPES)
    rows = [line.split("&")[0].strip() for line in found["table.tex"].splitlines()]
    assert not [row for row in rows if row.startswith(("[", "*"))], "an argument of the line break before it"
    assert columns(found["table.md"]) == columns(wanted["table.md"])
    assert not re.search(r"(?<!\\)<(?!\w+>$)[a-zA-Z/!]", re.sub(r"`[^`]*`", "", found["table.md"]))
    for row in csv.reader(StringIO(found["cells.csv"])):
        assert not [cell for cell in row if cell.startswith(("=", "+", "-", "@")) and not re.fullmatch(r"-?[0-9.]+", cell)]
    assert json.loads(found["cells.json"])["title"] == words


ESCAPES = (
    "textbackslash", "textbar", "textless", "textgreater", "textasciitilde", "textasciicircum", "textasteriskcentered",
    "textquotedbl", "{", "}", "&", "%", "$", "#", "_", "pm", "times", "cdot", "dag",
)  # fmt: skip


def latex_commands(tex: str) -> set[str]:
    return set(re.findall(r"\\([a-zA-Z]+|.)", tex))


def columns(markdown: str) -> list[int]:
    """Cells of each table row."""
    return [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")]


CONTROL = ["\x1b]0;owned\x07", "\x1b[2J", "\u202etxt.exe", "\x00", "\x9b31m", "\u2028", "\ud800"]


@pytest.mark.parametrize("words", CONTROL)
def test_controls_are_refused_in_records(words: str, tmp_path: Path) -> None:
    profile = make(tmp_path)
    path = profile.layout.record("isd", "pretrain")
    tree = json.loads(path.read_text("utf-8"))
    tree["label"] = words
    path.write_text(json.dumps(tree), "utf-8")
    with pytest.raises(DataError, match="not a PretrainRecord: "):
        profile.records()


@pytest.mark.parametrize("words", CONTROL)
def test_nothing_printed_drives_a_terminal(words: str) -> None:
    assert all(sign == "\n" or sign.isprintable() for sign in printable(f"a{words}b\nc"))
    assert printable("plain, ünï\u00a0<b>\n") == "plain, ünï\u00a0<b>\n".replace("\u00a0", "\u00a0")
    for escape in (text.latex, text.markdown, text.csv_cell):
        assert escape(f"a{words}b").isprintable()


def test_evaluate_prints_and_writes_names_as_they_are(done: Path) -> None:
    """A label and class names that a terminal or a markup would obey."""
    folder = done / "data/prepared/digits"
    ask = ("evaluate", "--ckpt", "runs/isd/encoder.safetensors", "--prepared", str(folder), "--k", "1", "--per-class")
    chain.refused(chain.call(done, *ask, "--label", "[red]\x1b[31m[/red]"), "contains invisible characters", code=3)
    (done / "runs/isd/encoder.safetensors").rename(done / "\x1b[31m.safetensors")
    odd = ("evaluate", "--ckpt", "\x1b[31m.safetensors", *ask[3:], "--json", "--no-cache")
    result = chain.call(done, *odd)
    assert result.code == 0, result
    assert json.loads(result.out)["file"] == r"\x1b[31m.safetensors"
    assert (result.out + result.err).replace("\n", "").isprintable()
    (done / "\x1b[31m.safetensors").rename(done / "runs/isd/\udcff.safetensors")
    result = chain.call(done, "evaluate", "--ckpt", "runs/isd/\udcff.safetensors", *ask[3:], "--no-cache")
    assert result.code == 0, result
    assert (result.out + result.err).replace("\n", "").isprintable()
    (done / "runs/isd/\udcff.safetensors").rename(done / "runs/isd/encoder.safetensors")
    result = chain.call(done, *ask, "--label", "[red]x[/red]", "--no-cache")
    assert result.code == 0
    assert "[red]x[/red]" in result.out


# --- records from strangers ---------------------------------------------------------------------------------------------


def in_record(change: Callable[[dict[str, Any]], object], tmp_path: Path, part: Any = "knn") -> str:
    profile = make(tmp_path)
    path = profile.layout.record("isd", part)
    tree = json.loads(path.read_text("utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), "utf-8")
    with pytest.raises(DataError) as caught:
        profile.files()
    assert str(path) in caught.value.message
    return caught.value.message


ABSURD: dict[str, tuple[Any, Callable[[dict[str, Any]], object]]] = {
    "more queries than there can be": ("knn", lambda tree: tree["manifest"].update(query=10**12)),
    "counts beyond a float": ("knn", lambda tree: tree["scores"][0].update(n=10**400, correct=1)),
    "negative counts": ("knn", lambda tree: tree["scores"][0].update(correct=-1)),
    "a metric that is none": ("knn", lambda tree: tree["scores"][0].update(metric="\u0663-NN")),
    "seconds without end": ("knn", lambda tree: tree["provenance"].update(seconds=1e300)),
    "negative seconds": ("knn", lambda tree: tree["provenance"].update(seconds=-1)),
    "no number": ("knn", lambda tree: tree["provenance"].update(seconds=float("nan"))),
    "a loss without end": ("pretrain", lambda tree: tree["curve"][0].update(loss=1e308)),
    "an infinite loss": ("pretrain", lambda tree: tree["curve"][0].update(loss=float("inf"))),
    "no optimiser": ("pretrain", lambda tree: tree.update(config={}, fingerprint=config.fingerprint({}))),
    "an optimiser that is a list": (
        "pretrain",
        lambda tree: tree.update(config={"optim": []}, fingerprint=config.fingerprint({"optim": []})),
    ),
    "steps beyond a file": ("pretrain", lambda tree: tree.update(steps=10**30)),
    "a class that is large and absent": ("knn", lambda tree: tree["manifest"].update(large=["nobody"])),
}  # fmt: skip


@pytest.mark.parametrize("kind", ABSURD)
def test_absurd_records_are_refused(kind: str, tmp_path: Path) -> None:
    part, change = ABSURD[kind]
    in_record(change, tmp_path, part)


def test_a_packed_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = base64.b64encode(zlib.compress(bytes(200_000_000), 9)).decode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = in_record(lambda tree: tree["predictions"].update({"student/1-NN": bomb}), tmp_path)
    assert "no packed labels (more than 500 entries)" in message
    with pytest.raises(ValueError, match="more than 10000000 entries"):
        unpack_labels(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.parametrize("bomb", ["[" * 1_000_000, '{"a":' * 500_000, "9" * 1_000_000, "", "null", "[]", "\ufeff{}"])
def test_json_that_is_no_record(bomb: str, tmp_path: Path) -> None:
    profile = make(tmp_path)
    path = profile.layout.record("isd", "knn")
    path.write_text(bomb, "utf-8")
    with pytest.raises(DataError, match=r"knn\.json: not a EvaluationRecord"):
        profile.records()
