"""Measurements outside the package that anybody can repeat; no test asserts a time."""
