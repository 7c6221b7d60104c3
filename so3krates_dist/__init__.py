"""Distributed training of So3krates machine-learned force fields."""

__version__ = "0.1.0"
