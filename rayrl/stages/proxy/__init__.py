"""The proxy: the evaluator that is fitted on the paid judgements, and the pseudo-labels it gives to everything else."""
