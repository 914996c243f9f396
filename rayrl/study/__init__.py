"""Studies: strategies, budgets and settings beside each other, with error bars, from one TOML file."""
