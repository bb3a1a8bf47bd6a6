"""The record of `transfer`: one run, one checked evaluation for each target data set."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from isd_repro.artifacts import EvaluationRecord, ManifestIdentity, Provenance
from isd_repro.config.params import Frozen


class TransferEvaluation(EvaluationRecord):
    """One target data set.

    `manifest` is the target's: `train` images taught while C was chosen, `search` images, which are these and the validation
    images, taught the answer, `query` images asked. `mean_per_class` is by "<encoder>/transfer" and stated for every set;
    `metric` says which of the two numbers the field reports.
    """

    kind: Literal["transfer"] = "transfer"
    metric: Literal["top1", "mean-per-class"]
    mean_per_class: dict[str, float]  # percent

    def row(self) -> dict[str, float]:
        """The number that the field reports, in percent, by `<encoder>/<set>`."""
        top1 = self.metric == "top1"
        return {
            f"{score.encoder}/{self.manifest.subset}": score.top1
            if top1
            else self.mean_per_class[f"{score.encoder}/{score.metric}"]
            for score in self.scores
        }


class TransferRecord(Frozen):
    """All target data sets of one run; `manifest` is of the images that the encoder was trained on."""

    format: Literal[1] = 1
    kind: Literal["transfer"] = "transfer"
    profile: str
    run: str
    protocol: str
    settings: dict[str, Any]
    manifest: ManifestIdentity
    encoder_sha256: str
    evaluations: Annotated[tuple[TransferEvaluation, ...], Field(min_length=1)]
    provenance: Provenance


def mean_per_class(predicted: Tensor, label: Tensor) -> float:
    """Mean over the classes that have queries of the share answered rightly, in percent; both int64, Q."""
    size = torch.bincount(label)
    right = torch.bincount(label[predicted == label], minlength=len(size))
    asked = size > 0
    return 100.0 * float((right[asked].double() / size[asked].double()).mean())
