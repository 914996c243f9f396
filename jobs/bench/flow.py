"""Picture of both pipelines for the README: a row of stages each, in the order in which they run.

    python jobs/bench/flow.py                # writes jobs/bench/pictures/flow.svg

Which stages are paid for comes from the stage table; the rows are the stages that a run without options has; rlp's
row leaves out pool, select and samples, for room. `rayrl plan CONFIG` prints those of one config.
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from rayrl.runs.stage_table import (
    DPO,
    EVALUATE,
    FIT_EVALUATOR,
    FIT_REWARD_MODEL,
    GENERATE,
    POOL,
    PPO,
    PPO_REFRESHED,
    PREFERENCES,
    PSEUDO_LABEL,
    QUERY,
    REFIT_REWARD_MODEL,
    SELECT,
    SFT,
    SYNTHESIZE,
    Stage,
)

OUTPUT = Path(__file__).parent / "pictures" / "flow.svg"
Row = list[tuple[Stage, str]]
"""Stages from left to right, each with its text."""
PROXY_DPO: Row = [
    (POOL, "X\nprompts"),
    (SFT, "M1\nfrom M0 and\nseed data"),
    (GENERATE, "Y ~ M1\nk responses\nper prompt"),
    (SELECT, "Q\nthe few that\nteach most"),
    (QUERY, "E\nthe oracle's\njudgements of Q"),
    (FIT_EVALUATOR, "M_eval\nthe proxy,\nlearns from E"),
    (PSEUDO_LABEL, "P\npairs from\nscores of all Y"),
    (DPO, "M2\nfrom M1 and P"),
    (EVALUATE, "M2 against M1\non held-out\nprompts"),
]
RLP: Row = [
    (SFT, "M1\nfrom M0 and\nseed data"),
    (GENERATE, "pairs of M1's\nresponses"),
    (PREFERENCES, "D\nthe oracle's\ncomparisons"),
    (FIT_REWARD_MODEL, "r\nlearns from D"),
    (PPO, "pi\nfrom M1, with r\nas reward"),
    (SYNTHESIZE, "D^\npairs from pi's\nresponses"),
    (REFIT_REWARD_MODEL, "r^\nlearns from\nD and D^"),
    (PPO_REFRESHED, "pi^\nfrom M1, with r^\nas reward"),
    (EVALUATE, "pi^, pi and M1\non held-out\nprompts"),
]
WIDTH, HEIGHT, STEP = 1.36, 1.0, 1.56


def draw_row(axes: Axes, title: str, row: Row, bottom: float) -> None:
    """Draw one pipeline from left to right, its stages joined by arrows."""
    axes.text(0, bottom + HEIGHT + 0.42, title, fontsize=11, weight="bold")
    for number, (stage, text) in enumerate(row):
        left = number * STEP
        color = "#fde3c0" if stage.pays else "#eaf0fe"
        axes.add_patch(
            FancyBboxPatch(
                (left, bottom), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.08", fc=color, ec="#6b7280"
            )
        )
        axes.text(left + WIDTH / 2, bottom + HEIGHT + 0.08, stage.name, ha="center", fontsize=7, family="monospace")
        axes.text(left + WIDTH / 2, bottom + HEIGHT / 2, text, ha="center", va="center", fontsize=8.5)
        if number:
            axes.annotate(
                "",
                xy=(left, bottom + HEIGHT / 2),
                xytext=(left - STEP + WIDTH, bottom + HEIGHT / 2),
                arrowprops={"arrowstyle": "-|>", "color": "#1f2937"},
            )


def draw_bypass(axes: Axes, row: Row, first: Stage, last: Stage, bottom: float, depth: float, label: str) -> None:
    """Draw an arrow below a row, from one stage to a later one that needs its output too."""
    stages = [stage for stage, _ in row]
    start, end = (stages.index(stage) * STEP + WIDTH / 2 for stage in (first, last))
    axes.plot([start, start, end], [bottom, bottom - depth, bottom - depth], color="#1f2937", linewidth=1)
    axes.annotate(
        "", xy=(end, bottom), xytext=(end, bottom - depth), arrowprops={"arrowstyle": "-|>", "color": "#1f2937"}
    )
    axes.text((start + end) / 2, bottom - depth + 0.04, label, ha="center", fontsize=8)


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "rayrl"  # the same bytes every time
    figure = Figure(figsize=(11.4, 3.9))
    axes = figure.add_axes((0.01, 0.0, 0.98, 1.0))
    axes.set_xlim(-0.05, 8 * STEP + WIDTH + 0.05)
    axes.set_ylim(-0.5, 4.25)
    axes.axis("off")
    draw_row(axes, "proxy_dpo (arXiv 2407.02119)", PROXY_DPO, bottom=2.6)
    draw_bypass(
        axes, PROXY_DPO, GENERATE, PSEUDO_LABEL, 2.6, 0.25, "all responses, most of them never judged by the oracle"
    )
    draw_row(axes, "rlp (arXiv 2403.19279)", RLP, bottom=0.15)
    draw_bypass(axes, RLP, SFT, PPO_REFRESHED, 0.15, 0.5, "PPO starts from M1 again")
    draw_bypass(
        axes,
        RLP,
        PREFERENCES,
        REFIT_REWARD_MODEL,
        0.15,
        0.25,
        "the comparisons are used again, and no new ones are paid",
    )
    axes.text(8 * STEP + WIDTH, 4.05, "orange: paid questions to the oracle", ha="right", fontsize=9, color="#b45309")
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, metadata={"Date": None})
    print(OUTPUT)


if __name__ == "__main__":
    main()
