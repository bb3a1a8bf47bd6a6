"""Loads encoders from checkpoints of this and other projects, accounting for every tensor and running no code from the file."""

from isd_repro.checkpoints.account import TensorUse
from isd_repro.checkpoints.loading import Checkpoint, Inspection, inspect, load

__all__ = ["Checkpoint", "Inspection", "TensorUse", "inspect", "load"]
