"""Which images t-SNE shows, and that it draws what has no direction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isd_repro.report import tsne
from isd_repro.runtime.errors import DataError


def test_ten_classes_and_a_hundred_images_of_each_at_most() -> None:
    label = torch.arange(12).repeat_interleave(torch.tensor([150, 120, *[3] * 10]))
    for seed in range(20):
        chosen = tsne.choose(label, torch.Generator().manual_seed(seed))
        kept = label[chosen]
        assert len(kept.unique()) == 10
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        for cls in kept.unique().tolist():
            assert int((kept == cls).sum()) == min(100, int((label == cls).sum()))
    same = [tsne.choose(label, torch.Generator().manual_seed(5)).tolist() for _ in range(2)]
    assert same[0] == same[1]


def test_too_few_images_are_said() -> None:
    with pytest.raises(DataError, match="3 query images"):
        tsne.choose(torch.tensor([0, 1, 1]), torch.Generator().manual_seed(0))


def test_a_collapsed_encoder_is_drawn_all_the_same() -> None:
    points, _ = tsne.draw(torch.full((12, 4), 0.5), seed=0)
    assert np.isfinite(points).all()
