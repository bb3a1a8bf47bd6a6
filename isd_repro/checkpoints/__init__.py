"""Reads encoders from checkpoints: ours and everybody else's, every tensor accounted for and no code of the file run."""

from isd_repro.checkpoints.account import TensorUse
from isd_repro.checkpoints.loading import Checkpoint, Inspection, inspect, load

__all__ = ["Checkpoint", "Inspection", "TensorUse", "inspect", "load"]
