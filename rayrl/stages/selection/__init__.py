"""The choice of what the oracle is asked about: candidates, their vectors, and the strategy that picks."""
