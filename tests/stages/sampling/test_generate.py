"""Generation: texts that count as responses, and the seeds that they come from."""

from rayrl.records import Response
from rayrl.stages.sampling.generate import distinct, response_seed


def response(index, text):
    return Response(
        id=f"p-{index}",
        text=text,
        token_ids=[index],
        seed=index,
        policy_version="m1",
        logprob=0.0,
        finish_reason="stop",
    )


def test_empty_and_repeated_responses_are_dropped_and_repeats_counted():
    sampled = [response(i, text) for i, text in enumerate(["a", " \n", "b", "a", "", "a "])]
    assert [(r.id, r.num_samples) for r in distinct(sampled)] == [("p-0", 2), ("p-2", 1), ("p-5", 1)]
    assert distinct([]) == []


def test_every_place_has_its_own_seed():
    seeds = {response_seed(s, p, i) for s in range(3) for p in ("p", "q", "p1") for i in range(20)}
    assert len(seeds) == 3 * 3 * 20
    assert response_seed(0, "p", 1) == response_seed(0, "p", 1)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
