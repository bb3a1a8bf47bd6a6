"""Every evaluation refuses files that are not the run's own: one place checks them for all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from isd_repro import evaluations
from isd_repro.evaluations.stage import extract, run_evaluation
from isd_repro.runtime.errors import EXIT_DATA, DataError
from isd_repro.runtime.files import sha256_file
from tests.evaluations.test_stages import NARROW, World, world, write_encoder, write_prepared  # noqa: F401 - a fixture

DEMO = Path(__file__).parents[2] / "reports" / "demo" / "records" / "isd" / "pretrain.json"


def refused(world: World, kind: str, match: str) -> None:  # noqa: F811
    with pytest.raises(DataError, match=match) as caught:
        world.run(partial(run_evaluation, kind), "isd")
    assert caught.value.exit_code == EXIT_DATA == 4
    assert not world.layout.record("isd", kind).exists()


def add_run(world: World, name: str, seed: int) -> None:  # noqa: F811
    world.params = world.params.model_copy(update={"runs": {**world.params.runs, name: world.params.runs["isd"]}})
    write_encoder(world.layout.encoder(name), NARROW, ("student", "teacher"), world.manifest.sha256, seed)
    world.run(extract, name)


@pytest.mark.parametrize("kind", evaluations.names())
def test_another_runs_encoder_and_features(world: World, kind: str) -> None:  # noqa: F811
    """The files fit each other, and neither is this run's."""
    add_run(world, "moco", seed=1)
    for path in (world.layout.encoder, world.layout.features):
        shutil.copy(path("moco"), path("isd"))
    refused(world, kind, r"encoder\.safetensors: belongs to run 'moco', not 'isd'")


@pytest.mark.parametrize("kind", evaluations.names())
def test_an_encoder_that_the_pretrain_record_does_not_name(world: World, kind: str) -> None:  # noqa: F811
    world.run(extract, "isd")
    record = json.loads(DEMO.read_text("utf-8"))
    path = world.layout.record("isd", "pretrain")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    refused(world, kind, r"encoder\.safetensors: its sha256 is .* names")
    path.write_text(json.dumps({**record, "encoder_sha256": sha256_file(world.layout.encoder("isd"))}))
    if kind == "knn":
        world.run(partial(run_evaluation, kind), "isd")


@pytest.mark.parametrize("kind", evaluations.names())
def test_other_images(world: World, kind: str) -> None:  # noqa: F811
    world.run(extract, "isd")
    images = (replace(world.manifest.images[0], sha256="another"), *world.manifest.images[1:])
    write_prepared(world.layout.prepared("toy"), replace(world.manifest, images=images), world.pixels)
    refused(world, kind, "manifest changed since it was made")


@pytest.mark.parametrize("kind", ["knn", "linear", "few_label"])
def test_features_of_another_run(world: World, kind: str) -> None:  # noqa: F811
    world.run(extract, "isd")
    add_run(world, "moco", seed=1)
    shutil.copy(world.layout.features("moco"), world.layout.features("isd"))
    refused(world, kind, r"features\.safetensors: made by encoder file")
