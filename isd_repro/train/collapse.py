"""Whether the embeddings of a training collapsed, by its curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

EMBEDDING_STD = "spread"  # a method's metric by its name in records, see `nn.health.embedding_std`
LABELS = {EMBEDDING_STD: "embedding std", "gap": "cosine distance"}  # what people read; records have the keys
LEAST_EMBEDDING_STD = 0.01  # below it the embeddings have collapsed


def collapsed(row: Mapping[str, float]) -> bool:
    """Whether an epoch's embeddings have collapsed: almost the same embedding for every image."""
    return row.get(EMBEDDING_STD, math.inf) < LEAST_EMBEDDING_STD


def warning(curve: Sequence[Mapping[str, float]]) -> str:
    """A run's collapsed epochs in words; empty where there are none."""
    rows = [row for row in curve if collapsed(row)]
    if not rows:
        return ""
    epochs = f"{len(rows)} of {len(curve)} epochs, first {int(rows[0]['epoch'])}, last {int(rows[-1]['epoch'])}"
    least = min(row[EMBEDDING_STD] for row in rows)
    return f"embeddings collapsed in {epochs}: embedding std down to {least:.2g}, below {LEAST_EMBEDDING_STD:g}"
