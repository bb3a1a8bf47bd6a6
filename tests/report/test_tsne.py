"""t-SNE's input and the number beside it against plain loops; what it draws only where it must be so."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from torch import Tensor

from isd_repro.report import tsne
from isd_repro.runtime.errors import DataError


def groups(each: int = 20, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    centre = 3 * torch.randn(3, 8, generator=draw)
    label = torch.arange(3).repeat_interleave(each)
    return centre[label] + spread * torch.randn(3 * each, 8, generator=draw), label


def test_the_input_is_what_its_hash_says() -> None:
    """Rows whose unit vectors float32 holds exactly."""
    rows = torch.tensor([[2.0, 0, 0], [0, -4.0, 0], [0, 0, -16.0], [0, 0, 0.5], [0, 8, 0], [-1, 0, 0]])
    unit = [[1.0, 0, 0], [0, -1.0, 0], [0, 0, -1.0], [0, 0, 1.0], [0, 1.0, 0], [-1.0, 0, 0]]
    expected = hashlib.sha256(b"".join(struct.pack("<f", value) for row in unit for value in row)).hexdigest()
    assert tsne.draw(rows, torch.zeros(6, dtype=torch.int64), seed=0).input_sha256 == expected


def test_equal_input_gives_equal_points_and_the_hash_follows_the_input() -> None:
    rows, label = groups()
    first = tsne.draw(rows, label, seed=4)
    again = tsne.draw(rows.clone(), label, seed=4)
    assert torch.equal(first.points, again.points)
    assert (first.divergence, first.input_sha256) == (again.divergence, again.input_sha256)
    changed = rows.clone()
    changed[5, 2] += 0.01
    assert tsne.draw(changed, label, seed=4).input_sha256 != first.input_sha256


def test_neighbours_against_loops() -> None:
    draw = torch.Generator().manual_seed(2)
    rows = torch.nn.functional.normalize(torch.randn(40, 5, generator=draw), dim=1)
    rows[7] = rows[3]  # a copy is a neighbour, and a point is none of its own
    label = torch.randint(0, 3, (40,), generator=draw)
    hits = 0
    for a in range(40):
        similar = {b: float((rows[a].double() * rows[b].double()).sum()) for b in range(40) if b != a}
        best = max(similar, key=lambda b: similar[b])  # the first of equals
        hits += int(label[a] == label[best])
    assert 0 < hits < 40
    assert tsne.neighbours(rows, label) == pytest.approx(100 * hits / 40)


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
    drawn = tsne.draw(torch.ones(12, 4), torch.arange(12) % 2, seed=0)
    assert bool(torch.isfinite(drawn.points).all())
