"""Tracking of a stage's numbers: `metrics.jsonl` and pictures on disk are authoritative, and Weights & Biases shows a copy.

W&B is used if it is installed and not switched off: online if an API key is configured, otherwise offline. Any exception of W&B
leads to one warning and switches W&B off; it cannot stop a run, and waits for it are bounded. `WANDB_MODE` overrides the
parameter unless that is `off`. `isd-repro wandb publish` later sends from disk whatever W&B did not receive.
"""

from isd_repro.tracking.metrics import read_metrics, truncate_metrics
from isd_repro.tracking.session import wanted_mode
from isd_repro.tracking.tracker import RunTracker, open_stage, open_tracker

__all__ = ["RunTracker", "open_stage", "open_tracker", "read_metrics", "truncate_metrics", "wanted_mode"]
