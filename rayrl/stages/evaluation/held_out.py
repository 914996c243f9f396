"""Answers of a policy to the held-out prompts, and what the expert says of them, under a budget of their own."""

from dataclasses import dataclass
from functools import partial

from ray.actor import ActorHandle

from rayrl.config import GenerateConfig
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.fleets.services import Services
from rayrl.models.served_reward import ServedReward
from rayrl.records import Checkpoint, Response, Sampled, Scored, from_row
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Pool
from rayrl.stages.labelling.query import expert_scores
from rayrl.stages.sampling.generate import sample_block


@dataclass(kw_only=True)
class Answer:
    """One policy's answer to a held-out prompt."""

    prompt_id: str
    prompt: str
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    logprob: float
    """Under the policy that wrote it."""
    score: float | None = None


def answers_of(run: Run, services: Services, m1: Checkpoint, policy: Checkpoint, pool: Pool, name: str) -> list[Answer]:
    """One answer per held-out prompt; all policies draw from the same seeds."""
    return [_answer(row, row.responses[:1]) for row in _sampled(run, services, m1, policy, pool, name, 1)]


def best_of_n(run: Run, services: Services, m1: Checkpoint, pool: Pool, rewards: ServedReward) -> list[Answer]:
    """Of n answers of M1 to each held-out prompt the one of the highest reward; the first one is M1's answer."""
    n = run.config.evaluate.best_of_n
    rows = _sampled(run, services, m1, m1, pool, f"best_of_{n}", n)
    items = [
        Scored(prompt=row.prompt, response=said.text, token_ids=row.prompt_token_ids + said.token_ids)
        for row in rows
        for said in row.responses
    ]
    scores = iter(rewards.score(items))
    best = []
    for row in rows:
        scored = [(score, said) for said in row.responses if (score := next(scores)) is not None]
        best.append(_answer(row, [max(scored, key=lambda pair: pair[0])[1]] if scored else row.responses[:1]))
    return best


def _sampled(
    run: Run, services: Services, m1: Checkpoint, policy: Checkpoint, pool: Pool, name: str, k: int
) -> list[Sampled]:
    """Answers to the held-out prompts, k each, without repeats."""
    sampling = sampling_of(run, k)
    table = BlockTable(run.folder("evaluate", f"{name}-{policy.version}"), pool.held_out.num_blocks)
    fleet = services.generators(m1)
    compute = partial(sample_block, pool.held_out, fleet, policy, sampling, run.config.seed)
    map_blocks(
        table,
        compute,
        concurrency=fleet.concurrency,
        describe=lambda block: {"num": block.num_rows},
        progress=f"answer {name}",
    )
    return [from_row(row, Sampled) for block in table.blocks() for row in block.to_pylist()]


def sampling_of(run: Run, k: int = 1) -> GenerateConfig:
    """How held-out prompts are answered: as in `generate`, at a temperature of their own."""
    config = run.config
    return config.generate.model_copy(update={"k": k, "source": "policy", "temperature": config.evaluate.temperature})


def _answer(row: Sampled, responses: list[Response]) -> Answer:
    said = responses[0] if responses else None  # nothing said is an answer too
    return Answer(
        prompt_id=row.prompt_id,
        prompt=row.prompt,
        prompt_token_ids=row.prompt_token_ids,
        text=said.text if said else "",
        token_ids=said.token_ids if said else [],
        logprob=said.logprob if said else 0.0,
    )


def judge(oracle: ActorHandle, answers: list[Answer]) -> None:
    """Write the expert's scores into the answers; None where it abstains."""
    texts = [(a.prompt_id, a.prompt, a.text) for a in answers]
    for answer, score in zip(answers, expert_scores(oracle, texts, describe="evaluating"), strict=True):
        answer.score = score
