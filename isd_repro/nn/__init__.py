"""Bricks that two or more methods use."""
