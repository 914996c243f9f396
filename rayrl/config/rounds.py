"""What repeating an algorithm, or adding synthetic pairs to it, excludes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayrl.config.run import RunConfig


def refusals(config: "RunConfig") -> Iterator[tuple[bool, str]]:
    """Whether each rule is broken, and what is said then."""
    if config.rounds > 1:
        yield from _of_rounds(config)
    if config.pseudo_label.synthetic:
        yield from _of_synthetic_pairs(config)


def _of_rounds(config: "RunConfig") -> Iterator[tuple[bool, str]]:
    got = f"got {config.rounds}"
    is_rlp, preferences = config.pipeline == "rlp", config.preferences
    learns = is_rlp and config.ppo.reward == "reward_model"
    compares = learns and preferences is not None and preferences.source == "oracle"
    is_paid = compares or not is_rlp or config.ppo.reward == "evaluator"
    least = config.rounds * _least_queries(config, compares=compares)
    yield (
        not is_rlp and config.labels in ("direct", "expert"),
        f'rounds must be 1 when labels is "{config.labels}", {got}: its controls are of one round; set rounds = 1',
    )
    yield (
        is_paid and config.select.budget < least,
        f"select.budget must be at least {least}, so that each of {config.rounds} rounds can ask, got "
        f"{config.select.budget}; raise it, or lower rounds",
    )
    yield (
        is_rlp and config.ppo.reward == "function",
        f'rounds must be 1 when ppo.reward is "function", {got}: a function learns nothing from a round',
    )
    yield (
        learns and not compares and config.refresh.method == "none",
        f'rounds must be 1 when refresh.method is "none" and preferences.source is "data", {got}: nothing would change '
        'from round to round; choose another refresh, or preferences.source = "oracle"',
    )
    yield (
        compares and config.refresh.method == "ocrm",
        f'rounds must be 1 when refresh.method is "ocrm" and preferences.source is "oracle", {got}: its weights are '
        "for pairs that M1 wrote, and a later round's are another policy's; choose another refresh",
    )
    yield (
        compares and config.reward_model.path is not None,
        f'rounds must be 1 with a ready-made reward_model.path and preferences.source = "oracle", {got}: every round '
        "fits r on the pairs so far; leave the path out",
    )


def _least_queries(config: "RunConfig", *, compares: bool) -> int:
    """What a round asks at least."""
    if compares:
        assert config.preferences is not None
        return 2 if config.preferences.order == "both" else 1
    return config.generate.k if config.select.unit == "prompt" else 1


def _of_synthetic_pairs(config: "RunConfig") -> Iterator[tuple[bool, str]]:
    yield (
        config.pipeline != "proxy_dpo",
        f'pseudo_label.synthetic must be false when pipeline is "{config.pipeline}", got true: there refresh.method = '
        '"spg" makes the synthetic pairs',
    )
    yield (
        config.labels in ("direct", "expert"),
        f'pseudo_label.synthetic must be false when labels is "{config.labels}", got true: no evaluator is fitted that '
        "could rank the responses of a cluster",
    )
    yield (
        config.refresh.method != "spg",
        f'refresh.method must be "spg" when pseudo_label.synthetic is true, got "{config.refresh.method}"',
    )
