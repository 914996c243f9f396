"""Alignment of language models when expert labels are scarce."""

__version__ = "0.1.0"
