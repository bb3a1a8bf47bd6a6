"""The profile that `tests/verify` makes, for authors who cheat with it."""

from __future__ import annotations

from tests.verify.conftest import _state_is_local, clean, profile, whole

__all__ = ["_state_is_local", "clean", "profile", "whole"]
