"""From scores to pairs: whose score counts, and who takes no part."""

from dataclasses import asdict, replace

import pyarrow as pa

from rayrl.config import PseudoLabelConfig
from rayrl.data.blocks import BlockTable
from rayrl.records import PreferencePair, Sampled, from_table, to_table
from rayrl.stages.proxy.pair_blocks import PairBlocks, count_scores, pairs_of
from rayrl.stages.synthesis.synthetic_pairs import BlockRewards, SyntheticPairs
from tests.fakes import sampled

BEST_WORST = PseudoLabelConfig()
MARGIN = PseudoLabelConfig(pairing="margin", min_margin=1.0)


def pairs(scores, config, sources=None):
    scored = {"prompt_id": "p", "scores": scores, "sources": sources or ["evaluator"] * len(scores)}
    return pairs_of(asdict(sampled(len(scores))), scored, config)


def ids(found):
    return [(pair.chosen_id, pair.rejected_id) for pair in found]


def test_best_against_worst():
    assert ids(pairs([2.0, 4.5, 1.0, 3.0], BEST_WORST)) == [("p-1", "p-2")]


def test_every_pair_beyond_the_margin():
    assert ids(pairs([2.0, 4.5, 1.0, 3.5], MARGIN)) == [
        ("p-1", "p-0"),
        ("p-1", "p-2"),
        ("p-3", "p-0"),
        ("p-3", "p-2"),
    ]


def test_ties_make_no_pair():
    assert pairs([3.0, 3.0, 3.0], BEST_WORST) == []
    assert pairs([3.0, 2.0], MARGIN) == []
    assert pairs([3.0], BEST_WORST) == []
    assert pairs([], MARGIN) == []


def test_the_unscored_take_no_part():
    assert ids(pairs([None, 2.0, None, 5.0], BEST_WORST)) == [("p-3", "p-1")]
    assert ids(pairs([None, 2.0, None, 5.0], MARGIN)) == [("p-3", "p-1")]
    assert pairs([None, 2.0, None], BEST_WORST) == []
    assert pairs([None, None], MARGIN) == []


def test_a_pair_carries_both_sides_whole():
    (pair,) = pairs([1.0, 5.0], BEST_WORST, ["oracle", "evaluator"])
    assert pair.chosen == "text 1"
    assert pair.rejected_token_ids == [10, 2]
    assert pair.prompt_token_ids == [1, 5]
    assert (pair.chosen_score, pair.rejected_score) == (5.0, 1.0)
    assert (pair.chosen_reference_logprob, pair.rejected_reference_logprob) == (-1.0, 0.0)
    assert pair.source == "mixed"
    assert pairs([1.0, 5.0], BEST_WORST, ["oracle"] * 2)[0].source == "oracle"


class ByLength:
    """An evaluator that counts what it is asked."""

    def __init__(self):
        self.asked = []

    def score(self, items, reasons=None):
        self.asked += [item.response for item in items]
        if reasons is not None:
            reasons |= {number: "too_long" for number, item in enumerate(items) if item.response == "text 3"}
        return [None if item.response == "text 3" else float(item.response[-1]) for item in items]


def said(scores):
    """Scores by what was said, from scores by response id."""
    return {(name[0], f"text {name[2]}"): score for name, score in scores.items()}


def pair_blocks(tmp_path, scorer, paid):
    table = BlockTable(str(tmp_path / "responses"), 1)
    table.write(0, to_table([sampled(4), sampled(2, "q")], Sampled))
    return PairBlocks(
        responses=table,
        scored=BlockTable(str(tmp_path / "scored"), 1),
        pairs=BlockTable(str(tmp_path / "pairs"), 1),
        scorer=scorer,
        paid=paid,
        config=BEST_WORST,
    )


def test_the_oracles_score_wins_and_is_not_asked_again(tmp_path):
    scorer = ByLength()
    made = pair_blocks(tmp_path, scorer, said({"p-0": 5.0, "q-1": 0.0}))
    scored = made.score_block(0).to_pylist()
    assert scored[0]["scores"] == [5.0, 1.0, 2.0, None]
    assert scored[0]["sources"] == ["oracle", "evaluator", "evaluator", "too_long"]
    counts = count_scores(made.score_block(0))
    assert (counts["num_scored"], counts["num_abstained"], counts["num_too_long"]) == (5, 1, 1)
    scorer.asked = scorer.asked[:4]
    assert scored[1]["scores"] == [0.0, 0.0]
    assert scorer.asked == ["text 1", "text 2", "text 3", "text 0"]
    found = from_table(made.pair_block(0), PreferencePair)
    assert [(p.chosen_id, p.rejected_id, p.source) for p in found] == [("p-0", "p-1", "mixed")]


def test_nothing_is_scored_twice(tmp_path):
    scorer = ByLength()
    made = pair_blocks(tmp_path, scorer, {})
    assert made.pair_block(0) == made.pair_block(0)
    assert len(scorer.asked) == 6


def test_without_an_evaluator_only_the_oracles_scores_pair(tmp_path):
    made = pair_blocks(tmp_path, None, said({"p-0": 1.0, "p-2": 4.0, "q-0": 3.0}))
    found = made.pair_block(0)
    assert isinstance(found, pa.Table)
    assert [(p.chosen_id, p.rejected_id) for p in from_table(found, PreferencePair)] == [("p-2", "p-0")]


def test_what_was_judged_in_another_round_counts_whatever_its_id(tmp_path):
    made = pair_blocks(tmp_path, None, {("p", "text 3"): 2.0, ("p", "text 1"): 1.0, ("z", "text 0"): 5.0})
    scored = made.score_block(0).to_pylist()
    assert [row["scores"] for row in scored] == [[None, 1.0, None, 2.0], [None, None]]


def with_synthetic(tmp_path, scorer, *pairs):
    """Blocks whose prompt p has these synthetic pairs of response indices."""
    made = pair_blocks(tmp_path, scorer, {})
    table = BlockTable(str(tmp_path / "synthetic"), 1)
    (row,) = (row for row in made.responses.read(0).to_pylist() if row["prompt_id"] == "p")
    scored = {"scores": [0.0, 1.0, 2.0, None], "sources": ["evaluator"] * 4}
    of = {
        (pair.chosen_id, pair.rejected_id): replace(pair, source="spg")
        for pair in pairs_of(row, scored, PseudoLabelConfig(pairing="margin"))
    }
    table.write(0, to_table([of[f"p-{a}", f"p-{b}"] for a, b in pairs], PreferencePair))
    return replace(made, pairs=BlockTable(made.pairs.url, 2), synthetic=table)


def test_synthetic_pairs_follow_and_an_identical_one_is_there_once(tmp_path):
    made = with_synthetic(tmp_path, ByLength(), (2, 0), (2, 1))
    labelled, added = (from_table(made.pairs.memoised(n, made.pair_block), PreferencePair) for n in (0, 1))
    assert [(p.chosen_id, p.rejected_id, p.source) for p in labelled] == [
        ("p-2", "p-0", "evaluator"),
        ("q-1", "q-0", "evaluator"),
    ]
    assert [(p.chosen_id, p.rejected_id, p.source) for p in added] == [("p-2", "p-1", "spg")]
    assert made.pair_block(1).schema == made.pair_block(0).schema


def test_the_order_in_which_blocks_are_read_changes_nothing(tmp_path):
    scorer = ByLength()
    made = with_synthetic(tmp_path, scorer, (2, 0), (2, 1))
    first = made.pairs.memoised(1, made.pair_block)
    assert made.pairs.has(0), "a block's labelled pairs are made before its synthetic ones"
    assert first == made.pair_block(1) and len(scorer.asked) == 6


def test_the_scores_of_the_labelling_are_the_synthetic_pairs_rewards(tmp_path):
    scorer = ByLength()
    made = pair_blocks(tmp_path, scorer, {("p", "text 0"): 5.0})
    pairs = SyntheticPairs(
        method="spg",
        clustering="embedding",
        gamma=0.0,
        seed=0,
        m1_version="m1",
        rewards=BlockRewards(key="k", table=made.scored, compute=made.score_block),
        samples=made.responses,
        folder=str(tmp_path / "spg"),
    )
    scored = pairs.scored.memoised(0, pairs.score_block)
    assert scored["scores"].to_pylist() == [[5.0, 1.0, 2.0, None], [0.0, 1.0]]
    made.pair_block(0)
    assert len(scorer.asked) == 5, "nothing is scored for the one and again for the other"
