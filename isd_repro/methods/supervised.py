"""Supervised training with labels: the upper reference of every table.

loss = cross-entropy of a linear classifier on the backbone's features of view_student. With 0 epochs this file exports the
untrained encoder, or raw pixels where the backbone is `pixels`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from isd_repro.config.fields import Frozen
from isd_repro.interfaces import BackboneFactory, Batch, Setting, StepOutput
from isd_repro.nn.heads import unit
from isd_repro.nn.health import health


class Config(Frozen):
    """No keys beside the name."""


class Method(nn.Module):
    """A backbone and a classifier; the only method that reads labels."""

    needs_labels = True  # so it is not trained on images without any

    def __init__(self, config: Config, backbone: BackboneFactory, setting: Setting) -> None:
        super().__init__()
        self.config = config
        self.student = backbone()
        self.classifier = nn.Linear(self.student.features, setting.classes)

    def forward(self, batch: Batch) -> StepOutput:
        """Cross-entropy in nats and the share of the batch that is classified rightly."""
        features = self.student(batch.view_student)
        logits = self.classifier(features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        right = (logits.detach().argmax(1) == batch.label).float().mean()
        return StepOutput(F.cross_entropy(logits, batch.label), {"train_top1": 100 * right, **health(unit(features.detach()))})

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """There is no teacher."""
        return {"student": self.student}
