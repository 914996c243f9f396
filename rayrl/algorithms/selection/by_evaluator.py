"""Selection by what the evaluator of the round before does not know."""

import numpy as np
from jaxtyping import Int64

from rayrl.algorithms.selection.shards import Knowledge, Selection, largest_first, left_of, refuse_number, uniform_of


def score_entropy(ids: Int64[np.ndarray, " n"], num_selected: int, knowledge: Knowledge) -> Selection:
    """Pick argmax_i H(p(s | x_i)), p the evaluator's distribution over the scores of a response.

    Uncertainty sampling (Lewis & Gale, 1994) by predictive entropy (Settles, 2009, 2.3.1). Responses from which the
    evaluator abstains come after all others, in a drawn order: what it cannot read it cannot learn from either.
    """
    assert knowledge.entropies is not None, "the first round has another strategy"
    left = left_of(ids, knowledge.taken)
    refuse_number(num_selected, len(left))
    entropies = knowledge.entropies[np.searchsorted(np.sort(ids), left)]
    is_known = ~np.isnan(entropies)
    known, unknown = left[is_known], left[~is_known]
    best = known[largest_first(entropies[is_known], known, float(entropies[is_known].max(initial=0.0)))]
    drawn = unknown[np.argsort(uniform_of(unknown, knowledge.seed))]
    return Selection(ids=np.concatenate([best, drawn])[:num_selected].tolist())
