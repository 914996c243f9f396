"""Answers of a policy to the held-out prompts, and the oracle's scores of them under the evaluation budget."""

from dataclasses import dataclass, replace
from functools import partial

from ray.actor import ActorHandle

from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.engines.generator import Sampling
from rayrl.fleets.services import Services
from rayrl.models.served_reward import ServedReward
from rayrl.records import Checkpoint, Response, Sampled, Scored, from_row
from rayrl.runs.run import Run
from rayrl.runs.stage_table import ANSWERS, EVALUATE
from rayrl.stages.artifacts import Pool
from rayrl.stages.labelling.ask import oracle_scores
from rayrl.stages.sampling.generate import own_sampling, sample_block, sampling_of


@dataclass(kw_only=True)
class HeldOut:
    """One policy's answer to a held-out prompt."""

    prompt_id: str
    prompt: str
    prompt_token_ids: list[int]
    text: str
    """Empty where the policy said nothing."""
    token_ids: list[int]
    logprob: float
    """Under the policy that wrote it, nats."""
    score: float | None = None
    """The oracle's; None where it abstained, or was not asked."""

    def as_item(self) -> Scored:
        """Return the answer as evaluators and reward models read it."""
        return Scored(prompt=self.prompt, response=self.text, token_ids=self.prompt_token_ids + self.token_ids)


def answers_of(
    run: Run, services: Services, m1: Checkpoint, policy: Checkpoint, pool: Pool, name: str
) -> list[HeldOut]:
    """Sample one answer of a policy to each held-out prompt; all policies draw from the same seeds."""
    rows = _sampled(run, services, m1, policy, pool, name, 1, evaluation_sampling(run), keeps_all=True)
    return [_answer(row, row.responses[0]) for row in rows]


def own_samples(
    run: Run, services: Services, m1: Checkpoint, policy: Checkpoint, pool: Pool, name: str, answers: list[HeldOut]
) -> list[HeldOut]:
    """Return a sample of the policy itself for each held-out prompt: its answers, if they are such samples."""
    sampling = own_sampling(run.config.generate)
    if sampling == evaluation_sampling(run):
        return answers
    rows = _sampled(run, services, m1, policy, pool, f"own-{name}", 1, sampling, keeps_all=True)
    return [_answer(row, row.responses[0]) for row in rows]


def best_of_n(run: Run, services: Services, m1: Checkpoint, pool: Pool, reward: ServedReward) -> list[HeldOut]:
    """Take, of n answers of M1 to each held-out prompt, the one of the highest reward.

    The first of the n is M1's answer in `answers_of`. It also stands where the reward abstains on all of them.
    """
    n = run.config.best_of_n
    rows = _sampled(run, services, m1, m1, pool, f"best_of_{n}", n, evaluation_sampling(run))
    rewards = iter(reward.score([item for row in rows for item in row.items()]))
    best: list[HeldOut] = []
    for row in rows:
        chosen = row.responses[0] if row.responses else None
        highest: float | None = None
        for response in row.responses:
            value = next(rewards)
            if value is not None and (highest is None or value > highest):
                chosen, highest = response, value
        best.append(_answer(row, chosen))
    return best


def _sampled(
    run: Run,
    services: Services,
    m1: Checkpoint,
    policy: Checkpoint,
    pool: Pool,
    name: str,
    k: int,
    sampling: Sampling,
    *,
    keeps_all: bool = False,
) -> list[Sampled]:
    """Sample k answers to each held-out prompt; the blocks are kept in the stage's folder."""
    # Named by the policy's version: a run that continues with other weights must not read the old answers, and one with
    # a larger budget reads them again.
    table = BlockTable(run.folder(EVALUATE, f"{ANSWERS}{name}-{policy.version}"), pool.held_out.num_blocks)
    fleet = services.generators(m1)
    compute = partial(sample_block, pool.held_out, fleet, policy, k, sampling, run.seed, keeps_all=keeps_all)
    map_blocks(
        table,
        compute,
        concurrency=fleet.concurrency,
        describe=lambda block: {"num_rows": block.num_rows},
        progress=f"answer {name}",
    )
    return [from_row(row, Sampled) for block in table.blocks() for row in block.to_pylist()]


def evaluation_sampling(run: Run) -> Sampling:
    """Return how held-out prompts are answered: as in `generate`, at a temperature of their own."""
    return replace(sampling_of(run.config.generate), temperature=run.config.evaluate.temperature)


def _answer(row: Sampled, response: Response | None) -> HeldOut:
    # Saying nothing is an answer, too: it is judged, and it counts. Its end of sequence is a token of the policy's.
    return HeldOut(
        prompt_id=row.prompt_id,
        prompt=row.prompt,
        prompt_token_ids=row.prompt_token_ids,
        text=response.text if response and response.text.strip() else "",
        token_ids=response.token_ids if response else [],
        logprob=response.logprob if response else 0.0,
    )


def judge_answers(oracle: ActorHandle, answers: list[HeldOut]) -> None:
    """Write the oracle's scores into the answers; None where it abstains."""
    texts = [(answer.prompt_id, answer.prompt, answer.text) for answer in answers]
    scores = oracle_scores(oracle, texts, EVALUATE, describe="evaluating")
    for answer, score in zip(answers, scores, strict=True):
        answer.score = score
