"""Entry points for `ray job submit`, their configs and the oracles they name."""
