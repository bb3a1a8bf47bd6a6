"""Reproducibility suite for ISD (Tejankar et al., ICCV 2021)."""

__version__ = "0.1.0"
