"""Pipelines: the two papers' algorithms, one call per line, and the command line around them."""
