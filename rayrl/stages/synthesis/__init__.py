"""Synthetic preference generation: clusters of a policy's samples by meaning, and the pairs that they make."""
