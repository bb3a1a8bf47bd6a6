"""Measurements that anybody can repeat; no test asserts a time."""
