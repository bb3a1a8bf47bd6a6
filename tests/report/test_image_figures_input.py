"""The command `figures`: snapshots, files of other runs, bad arguments, missing packages."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isd_repro import cli
from isd_repro.data.manifests import Manifest
from isd_repro.evaluations.encoders import load_encoders
from isd_repro.runtime.errors import DataError, UserError
from isd_repro.runtime.files import sha256_file
from isd_repro.tensor_files import load_tensors, save_tensors
from tests.evaluations.test_stages import write_encoder, write_prepared
from tests.report.figures_world import CLASSES, NARROW, World, make_manifest, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


# --- snapshots ----------------------------------------------------------------------------------------------------------


def snapshot(world: World, epoch: str, seed: int, **changes: Any) -> Path:
    path = world.layout.folder / "runs" / "isd" / "snapshots" / f"epoch-{epoch}.safetensors"
    write_encoder(path, NARROW, ("student", "teacher"), world.manifest.sha256, seed=seed)
    tensors, identity = load_tensors(path, "encoder")
    identity = {key: value for key, value in identity.items() if key not in {"kind", "format"}}
    save_tensors(path, "encoder", tensors, {**identity, "run": "isd", **changes})
    return path


def test_one_panel_for_each_snapshot_in_the_order_of_epochs(world: World) -> None:
    for epoch in ("0100", "00300", "00050", "700", "00060"):
        snapshot(world, epoch, seed=int(epoch))
    second = snapshot(world, "00020", seed=8)
    (second.parent / "notes.txt").write_text("not a snapshot")
    facts = world.draw("isd")
    panels = facts["tsne"]["panels"]
    assert [panel["epoch"] for panel in panels] == [20, 50, 60, 100, 300, 700, None]
    assert panels[0]["sha256"] == sha256_file(second)
    net = load_encoders(second)[0]["student"]
    query = torch.from_numpy(world.manifest.query)
    with torch.inference_mode():
        rows = torch.nn.functional.normalize(net(world.pixels[query].float() / 255).double(), dim=1)
    similar = (rows @ rows.T).fill_diagonal_(-1)
    label = torch.from_numpy(world.manifest.labels)[query]
    assert panels[0]["neighbours"] == pytest.approx(100 * float((label[similar.argmax(dim=1)] == label).double().mean()))
    assert len({panel["sha256"] for panel in panels}) == 7
    svg = world.files("isd")["tsne.svg"].decode()
    assert svg.index(">Epoch 20: ") < svg.index(">Epoch 100: ") < svg.index(">Final encoder: ")


@pytest.mark.parametrize("change", [{"run": "moco"}, {"fingerprint": "other"}, {"manifest": "0" * 64}])
def test_a_snapshot_of_another_run_is_refused(world: World, change: dict[str, str]) -> None:
    path = snapshot(world, "00001", seed=1, **change)
    with pytest.raises(DataError) as error:
        world.draw("isd")
    assert path.name in error.value.message
    assert next(iter(change)) in error.value.message
    assert not world.folder("isd").exists()


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_features_of_another_encoder_are_refused(world: World) -> None:
    path = world.layout.features("isd")
    path.write_bytes(world.layout.features("moco").read_bytes())
    write_encoder(world.layout.encoder("isd"), NARROW, ("student", "teacher"), world.manifest.sha256, seed=9)
    with pytest.raises(DataError, match="made by encoder file"):
        world.draw("isd")


def test_images_of_another_draw_are_refused(world: World) -> None:
    other = make_manifest()
    other = Manifest(other.dataset, "toy", other.rule, CLASSES, ("cat",), other.images, other.train, other.search, other.query)
    write_prepared(world.layout.prepared("toy"), other, world.pixels)
    with pytest.raises(DataError, match="manifest changed"):
        world.draw("isd")


@pytest.mark.parametrize(("module", "extra"), [("sklearn.exceptions", "figures"), ("jinja2", "report")])
def test_a_missing_package_is_said_before_the_work(
    world: World, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    world.layout.features("isd").unlink()  # which would be the next thing to be missed
    with pytest.raises(UserError) as error:
        world.draw("isd")
    assert f"isd-repro[{extra}]" in error.value.hint


@pytest.fixture
def command(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(world.layout.folder)
        monkeypatch.setattr(sys, "argv", ["isd-repro", "figures", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().err

    return run


def test_the_command_line(world: World, command: Callable[..., tuple[int, str]]) -> None:
    code, told = command("isd", "raw", "--clusters", "2", "--members", "3", "--queries", "1", "--seed", "5", "--k", "6")
    assert code == 0, told
    for run in ("isd", "raw"):
        facts = json.loads(world.files(run)["figures.json"])
        assert [len(row["members"]) <= 3 for row in facts["clusters"]["shown"]] == [True, True]
        assert (facts["seed"], facts["clusters"]["k"], len(facts["anchors"]["shown"])) == (5, 6, 1)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("ids",), 3, "did you mean 'isd'"),
        (("isd", "--k", "26"), 3, "26 clusters of 25 images"),
    ],
)
def test_bad_arguments(command: Callable[..., tuple[int, str]], arguments: tuple[str, ...], code: int, words: str) -> None:
    found, told = command(*arguments)
    assert found == code
    assert words in told
    assert "Traceback" not in told
