"""Settings that a report shows: those that say what the run was. All others are in config.json."""

from rayrl.config import RunConfig
from rayrl.runs.stage_table import SAMPLES, fits_evaluator

Value = str | int | float | None


def shown_settings(config: RunConfig) -> dict[str, str]:
    """Name the settings that matter to the run's method, with their values; unset ones are left out."""
    shown: dict[str, Value] = {
        "rounds": config.rounds,
        "policy": config.policy.path,
        "prompts": config.pool.path,
    }
    if config.learns_from_judgements or config.asks_for_comparisons:
        shown |= _of_selection(config)
    if config.pipeline == "rlp":
        shown |= {"PPO reward": config.ppo.reward, "reward function": config.ppo.function}
    shown |= _of_oracle(config)
    if fits_evaluator(config):
        # A scalar evaluator has one way to score.
        is_generative = config.evaluator.type == "generative"
        shown |= {
            "evaluator": config.evaluator.type,
            "scoring": config.evaluator.scoring if is_generative else None,
        }
    if config.pipeline == "proxy_dpo":
        shown |= _of_dpo(config)
    if config.learns_from_comparisons:
        shown |= _of_preferences(config)
    if config.pipeline == "rlp":
        shown |= _of_ppo(config)
    if config.learns_from_comparisons:
        shown |= _of_refresh(config)
    return {title: str(value) for title, value in shown.items() if value is not None}


def _of_selection(config: RunConfig) -> dict[str, Value]:
    return {
        "responses per prompt": config.generate.k,
        "selection": config.select.strategy,
        "unit": config.select.unit if config.learns_from_judgements else None,
        "embedded text": config.select.text,
    }


def _of_oracle(config: RunConfig) -> dict[str, Value]:
    return {"oracle": config.oracle.type, **config.oracle.shown()}


def _of_dpo(config: RunConfig) -> dict[str, Value]:
    is_synthetic = config.pseudo_label.synthetic
    return {
        "pairing": config.pseudo_label.pairing,
        "synthetic pairs": "yes" if is_synthetic else "no",
        "clustering": config.refresh.spg.clustering if is_synthetic else None,
        "gamma": config.refresh.spg.gamma if is_synthetic else None,
        "DPO loss": config.dpo.loss,
        "DPO beta": config.dpo.beta,
        "DPO learning rate": config.dpo.learning_rate,
        "DPO epochs": config.dpo.epochs,
    }


def _of_preferences(config: RunConfig) -> dict[str, Value]:
    assert config.preferences is not None, "the config is refused without preferences"
    data = config.preferences.data
    is_asked = config.asks_for_comparisons
    bottleneck = config.reward_model.bottleneck
    return {
        "preferences": config.preferences.source,
        "preference file": None if is_asked or data is None else data.path,
        "order of comparisons": config.preferences.order if is_asked else None,
        "reward models": config.reward_model.num_members,
        "ready-made reward model": config.reward_model.path,
        "ensemble objective": config.reward_model.objective if config.reward_model.num_members > 1 else None,
        "reward model bottleneck": None
        if bottleneck is None
        else f"beta {bottleneck.beta:g}, {bottleneck.z_dim} dimensions",
        "reward model learning rate": config.reward_model.learning_rate,
    }


def _of_ppo(config: RunConfig) -> dict[str, Value]:
    return {
        "PPO learning rate": config.ppo.learning_rate,
        "PPO KL coefficient": config.ppo.kl_coef,
        "PPO target KL": config.ppo.target_kl,
        "PPO clip range": config.ppo.clip_range,
        "PPO rollout size": config.ppo.rollout_size,
        "PPO responses per prompt": config.ppo.k,
        "PPO advantages": config.ppo.advantages,
        "PPO overlap": "yes" if config.ppo.overlap else "no",
    }


def _of_refresh(config: RunConfig) -> dict[str, Value]:
    refresh = config.refresh
    is_spg = refresh.method == "spg"
    return {
        "refresh": refresh.method,
        "samples per prompt": refresh.n if SAMPLES.occurs(config, 1) else None,
        "clustering": refresh.spg.clustering if is_spg else None,
        "gamma": refresh.spg.gamma if is_spg else None,
        "views' objective": refresh.uml.objective if refresh.method == "uml" else None,
    }


def label_queries(config: RunConfig) -> str:
    """Name the queries of the label budget."""
    return "preference queries" if config.learns_from_comparisons else "label queries"
