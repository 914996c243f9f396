"""Models and prompts: policies, scalar heads, reward models, PPO's two networks, the entailment model, and the texts by
which oracles and evaluators judge. How they are trained is in `rayrl.training`, how they are served in `rayrl.engines`.
"""
