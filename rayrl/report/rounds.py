"""The rounds of a run: which stages each of them has, and where they are."""

from collections.abc import Collection, Mapping
from typing import Any

from rayrl.report.stages import AFTER, BEFORE, STAGES, has_ready_pairs, pipeline_of
from rayrl.runs.run import round_folder, round_name

REFRESH = ("samples", "synthesize", "importance", "refit_reward_model", "ppo_refreshed")
"""Of rlp: what a later round repeats if the preferences are those of a file."""


def num_rounds(config: Mapping[str, Any]) -> int:
    """Rounds of a resolved config; configs of before there were any have one."""
    return config.get("rounds", 1)


def round_folders(run_dir: str, config: Mapping[str, Any]) -> dict[int, str]:
    """The folder of each round, by its number."""
    return {number: round_folder(run_dir, number) for number in range(1, num_rounds(config) + 1)}


def stages_by_round(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Every stage with its round, in the order in which they come."""
    names = STAGES[pipeline_of(config)]
    within = [name for name in names if name not in (*BEFORE, *AFTER)]
    later = [name for name in within if name in REFRESH] if has_ready_pairs(config) else within
    stages = [(name, 1) for name in names if name in BEFORE] + [(name, 1) for name in within]
    stages += [(name, number) for number in range(2, num_rounds(config) + 1) for name in later]
    return stages + [(name, 1) for name in names if name in AFTER]


def titled(name: str, number: int) -> str:
    """What a stage, a policy or a curve of a round is called for humans."""
    return name if number == 1 else f"{name}, round {number}"


def untitled(title: str) -> str:
    """The stage that a title is of."""
    return title.partition(",")[0]


def latest(found: Collection[str], name: str, rounds: int) -> str:
    """The last round's policy or reward of this name among those found."""
    names = (round_name(name, number) for number in range(rounds, 0, -1))
    return next((of_round for of_round in names if of_round in found), name)
