"""The reward model r: its fit on preference pairs, and its refresh on the policy's own samples."""
