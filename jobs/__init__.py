"""Entry points for `ray job submit`, their configs and the experts they name."""
