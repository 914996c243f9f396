"""Trained evaluators: M_eval, its training on the paid judgements, and its scores of everything else.

Two kinds. A generative evaluator is the policy's architecture fine-tuned on written judgements. With the
score first, one prefill of the judge prompt gives the probability-weighted mean over the scores' tokens; with the
rationale first, it writes its review, the score is read at its own position, and several reviews are averaged. A scalar
evaluator is a head on the pooled hidden states of prompt and response.

Scorers travel to Ray tasks, each a process of its own, so this module loads torch only in the methods that train.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from jaxtyping import Float64

from rayrl.algorithms.scoring import expected_score, mean_of_samples, predictive_entropy
from rayrl.config import EvaluatorConfig, PolicyConfig
from rayrl.data.judge_prompts import render_judge_prompt
from rayrl.data.tokenizing import (
    context_length,
    encode_prompt,
    encode_response,
    load_tokenizer,
)
from rayrl.engines.generator import Continuation, Sampling
from rayrl.errors import DataError
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services
from rayrl.models.judge_prompt import (
    Rubric,
    Scoring,
    evaluator_target,
    score_texts,
    upto_score,
    whole_score,
)
from rayrl.models.served_reward import Reasons, ServedReward, score_fitting
from rayrl.records import Checkpoint, Judgement, ResponseKey, Scored, drawn_seed
from rayrl.runs.run import Run
from rayrl.runs.stage_table import FIT_EVALUATOR

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_MASS = 0.1
"""An evaluator that gives all scores together less probability than this has not understood the task: it abstains."""
MIN_TARGET_TOKENS = 8
"""score_first: a judge prompt that leaves less room than this in the context is not trained on."""
REVIEW_TEMPERATURE, REVIEW_TOP_P = 0.7, 0.9
"""Sampling of written reviews."""

LogProbs = Float64[np.ndarray, " scores"]
"""Of the scores that the rubric allows, by one judgement of a response."""


class Scorer(ServedReward):
    """A served evaluator: scores responses on the rubric's scale, and abstains where it cannot tell."""

    fleet: Fleet

    @property
    def concurrency(self) -> int:
        """Blocks to score at once."""
        return self.fleet.concurrency


class JobFields(TypedDict):
    """Fields that the jobs of all evaluators share."""

    stage: str
    run_url: str
    checkpoint_url: str
    policy: PolicyConfig
    start: Checkpoint
    dtype: str
    seed: int
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class EvaluatorTraining:
    """The training of an evaluator: rows of its table, and the worker's loop with its job."""

    rows: list[dict[str, Any]]
    num_too_long: int
    """Judgements left out because the evaluator's context is too short for them."""
    loop: Callable[[Any, Any], None]
    job: Any


@dataclass(frozen=True, kw_only=True)
class Evaluator(ABC):
    """An evaluator that is not served yet: a `Reward`."""

    run: Run
    checkpoint: Checkpoint
    """The fitted weights."""
    m1: Checkpoint
    """Weights that engines start with if they are not up, and that the training starts from."""
    settings: EvaluatorConfig
    policy: PolicyConfig
    rubric: Rubric
    pooling: Literal["mean", "last"]
    """Of the embedding replicas that serve a scalar evaluator."""
    seed: int

    @property
    def key(self) -> str:
        """Name of the weights."""
        return self.checkpoint.version

    @property
    def value_start(self) -> None:
        """The value function starts from M1."""
        return None

    @abstractmethod
    def serve(self, services: Services) -> Scorer:
        """Return the evaluator on the fleet of its kind."""


@dataclass(frozen=True, kw_only=True)
class TrainedEvaluator(Evaluator):
    """An evaluator that is a fine-tuned language model."""

    @abstractmethod
    def training(
        self, run: Run, dtype: str, judgements: list[Judgement], token_ids: Mapping[ResponseKey, list[int]]
    ) -> EvaluatorTraining:
        """Prepare the training on scored judgements; `token_ids` are those of prompt and response of each.

        Raises:
            DataError: nothing can be learnt from these judgements.
        """

    def _job_fields(self, run: Run, dtype: str, num_rows: int) -> JobFields:
        return JobFields(
            stage=FIT_EVALUATOR.name,
            run_url=run.url,
            checkpoint_url=self.checkpoint.path,
            policy=self.policy,
            start=self.m1,
            dtype=dtype,
            seed=run.seed,
            num_rows=num_rows,
        )


class GenerativeEvaluator(TrainedEvaluator):
    """The policy's architecture, fine-tuned to write judgements (evaluation fine-tuning)."""

    def serve(self, services: Services) -> "GenerativeScorer":
        return GenerativeScorer(
            checkpoint=self.checkpoint,
            fleet=services.ready(services.generators(self.m1)),
            settings=self.settings,
            policy=self.policy,
            rubric=self.rubric,
            seed=self.seed,
            max_tokens=context_length(self.policy),
        )

    def training(
        self, run: Run, dtype: str, judgements: list[Judgement], token_ids: Mapping[ResponseKey, list[int]]
    ) -> EvaluatorTraining:
        from rayrl.training.sft import SftJob, train_sft

        del token_ids  # the judge prompt is tokenised anew
        tokenizer = load_tokenizer(self.policy)
        limit = context_length(self.policy)
        row_of: dict[Judgement, dict[str, Any]] = {}
        for judgement in judgements:
            row = self._row(tokenizer, limit, judgement)
            if row is not None:
                row_of[judgement] = row
        fitting = [judgement for judgement in judgements if judgement in row_of]
        if not fitting:
            raise DataError(
                f"no judge prompt fits the context of {limit} tokens: shorten rubric.template or raise "
                "policy.max_model_len"
            )
        learnt_from = balance(fitting, self.rubric) if self.settings.balanced else fitting
        rows = [row_of[judgement] for judgement in learnt_from]
        job = SftJob(training=self.settings, **self._job_fields(run, dtype, len(rows)))
        num_too_long = len(judgements) - len(fitting)
        return EvaluatorTraining(rows=rows, num_too_long=num_too_long, loop=train_sft, job=job)

    def _row(self, tokenizer: "PreTrainedTokenizerBase", limit: int, judgement: Judgement) -> dict[str, Any] | None:
        """Write the row that teaches a judgement; None where the context is too short for it."""
        assert judgement.score is not None, "abstentions are never trained on"
        scoring = self.settings.scoring
        prompt_ids = judge_prompt_tokens(
            tokenizer, self.policy, self.rubric, judgement.prompt, judgement.response, scoring
        )
        target = evaluator_target(self.rubric, judgement.score, judgement.rationale, scoring)
        target_ids = encode_response(tokenizer, target, self.policy.prompt_format)
        # The rationale comes last where the score comes first, so cutting the end keeps the score. Elsewhere a cut
        # would teach reviews without a score.
        needed = min(len(target_ids), MIN_TARGET_TOKENS) if scoring == "score_first" else len(target_ids)
        room = limit - len(prompt_ids)
        if room < needed:
            return None
        return {
            "response_id": judgement.response_id,
            "prompt_token_ids": prompt_ids,
            "response_token_ids": target_ids[:room],
        }


class ScalarEvaluator(TrainedEvaluator):
    """A one-output head on the pooled hidden states of prompt and response."""

    def serve(self, services: Services) -> "ScalarScorer":
        return ScalarScorer(
            checkpoint=self.checkpoint,
            fleet=services.ready(services.embedders(self.m1, self.pooling)),
            max_tokens=context_length(self.policy),
        )

    def training(
        self, run: Run, dtype: str, judgements: list[Judgement], token_ids: Mapping[ResponseKey, list[int]]
    ) -> EvaluatorTraining:
        from rayrl.training.evaluator import ScalarJob, train_scalar
        from rayrl.training.reward_model import RewardModelJob, train_reward_model

        limit = context_length(self.policy)
        fitting = [judgement for judgement in judgements if len(token_ids[judgement.response_key]) <= limit]
        if not fitting:
            raise DataError(
                f"no judged response and its prompt fit the context of {limit} tokens: shorten them, or raise "
                "policy.max_model_len"
            )
        num_too_long = len(judgements) - len(fitting)
        if self.settings.loss == "bradley_terry":
            rows = _pair_rows(fitting, token_ids)
            fields = self._job_fields(run, dtype, len(rows))
            pair_job = RewardModelJob(training=self.settings, pooling=self.pooling, **fields)
            return EvaluatorTraining(rows=rows, num_too_long=num_too_long, loop=train_reward_model, job=pair_job)
        rows = [
            {
                "response_id": judgement.response_id,
                "token_ids": token_ids[judgement.response_key],
                "score": judgement.score,
            }
            for judgement in fitting
        ]
        # The head's bias starts at the mean, so that the first steps do not go into finding it.
        mean_score = float(np.mean([judgement.score for judgement in fitting if judgement.score is not None]))
        fields = self._job_fields(run, dtype, len(rows))
        job = ScalarJob(evaluator=self.settings, pooling=self.pooling, mean_score=mean_score, **fields)
        return EvaluatorTraining(rows=rows, num_too_long=num_too_long, loop=train_scalar, job=job)


@dataclass(frozen=True, kw_only=True)
class ScalarScorer(Scorer):
    """A scalar evaluator on its fleet."""

    checkpoint: Checkpoint
    fleet: Fleet
    max_tokens: int
    """Context: on a longer sequence it abstains."""

    def score(self, items: list[Scored], reasons: Reasons | None = None) -> list[float | None]:
        """Return the head's value of each response."""

        def values(numbers: list[int]) -> list[float]:
            inputs = [items[number].token_ids for number in numbers]
            return [float(value) for value in self.fleet.call("values", self.checkpoint, inputs)]

        return score_fitting([len(item.token_ids) for item in items], self.max_tokens, values, reasons)


@dataclass(frozen=True, kw_only=True)
class GenerativeScorer(Scorer):
    """A generative evaluator on its fleet."""

    checkpoint: Checkpoint
    fleet: Fleet
    settings: EvaluatorConfig
    policy: PolicyConfig
    rubric: Rubric
    seed: int
    max_tokens: int
    """Context: where a judge prompt leaves no room for a score in it, the evaluator abstains."""

    def score(self, items: list[Scored], reasons: Reasons | None = None) -> list[float | None]:
        """Return one score per response on the rubric's scale; None where the evaluator abstains."""
        scores = np.array(list(score_texts(self.rubric)))

        def mean_score(judgements: Sequence[LogProbs]) -> float | None:
            return mean_of_samples([expected_score(each, scores, min_mass=MIN_MASS) for each in judgements])

        return self._read(items, mean_score, reasons)

    def entropies(self, items: list[Scored]) -> list[float | None]:
        """Return the entropy of each response's score, in nats; None where the evaluator abstains."""
        return self._read(items, lambda judgements: predictive_entropy(judgements, min_mass=MIN_MASS), None)

    def _read(
        self, items: list[Scored], value: Callable[[Sequence[LogProbs]], float | None], reasons: Reasons | None
    ) -> list[float | None]:
        """Return `value` of the judgements of each response, one or several; None beyond the context."""
        tokenizer = load_tokenizer(self.policy)
        prompts = [
            judge_prompt_tokens(tokenizer, self.policy, self.rubric, item.prompt, item.response, self.settings.scoring)
            for item in items
        ]
        prefix, candidates = score_tokens(tokenizer, self.rubric)
        room = len(prefix) + _longest(candidates)

        def values(numbers: list[int]) -> list[float | None]:
            fitting = [prompts[number] for number in numbers]
            if self.settings.scoring == "score_first":
                # The scores share their first tokens, so those are read as a part of the prompt.
                upto = [prompt + prefix for prompt in fitting]
                logprobs = candidate_logprobs(self.fleet, self.checkpoint, upto, list(candidates.values()))
                judgements = [[np.array(row)] for row in logprobs]
            else:
                judgements = self._write_reviews(tokenizer, fitting, [items[number] for number in numbers])
            return [value(of_response) for of_response in judgements]

        return score_fitting([len(prompt) + room for prompt in prompts], self.max_tokens, values, reasons)

    def _write_reviews(
        self, tokenizer: "PreTrainedTokenizerBase", prompts: list[list[int]], items: list[Scored]
    ) -> list[list[LogProbs]]:
        """Have several reviews of each response written; the scores' log-probabilities in those that come to one."""
        sampling = Sampling(
            temperature=REVIEW_TEMPERATURE, top_p=REVIEW_TOP_P, max_tokens=self.settings.max_rationale_tokens
        )
        num_samples = self.settings.num_samples
        # A seed for each response and review, so that a block scored again gets the same scores.
        seeds = [
            [drawn_seed("review", str(self.seed), item.response, str(i)) for i in range(num_samples)] for item in items
        ]
        reviews: list[list[Continuation]] = self.fleet.call("write", self.checkpoint, prompts, seeds, sampling)
        written: list[tuple[list[int], Continuation]] = []
        for prompt, prompt_reviews in zip(prompts, reviews, strict=True):
            written += [(prompt, review) for review in prompt_reviews]
        found = self._read_reviews(tokenizer, written)
        of_each = [found[start : start + num_samples] for start in range(0, len(found), num_samples)]
        return [[logprobs for logprobs in of_response if logprobs is not None] for of_response in of_each]

    def _read_reviews(
        self, tokenizer: "PreTrainedTokenizerBase", written: list[tuple[list[int], Continuation]]
    ) -> list[LogProbs | None]:
        """Return the scores' log-probabilities at the place where each review (judge prompt, answer) has its score.

        None where the evaluator never got to a score. Where the scores' first tokens differ from each other, the
        log-probabilities that were recorded during writing are enough; otherwise every review takes one more prefill.
        """
        prefix, candidates = score_tokens(tokenizer, self.rubric)
        places: list[int | None] = []
        for prompt, review in written:
            place = score_place(tokenizer, review, prefix)
            # A review that the context ends before its score is complete never got there.
            is_cut = place is not None and len(prompt) + place + _longest(candidates) > self.max_tokens
            places.append(None if is_cut else place)
        arrived = [
            (prompt, review, place)
            for (prompt, review), place in zip(written, places, strict=True)
            if place is not None
        ]
        first_tokens = [token_ids[0] for token_ids in candidates.values()]
        if len(set(first_tokens)) == len(first_tokens):
            logprobs = [
                [review.candidates[place].get(token, -math.inf) for token in first_tokens]
                for _, review, place in arrived
            ]
        else:
            upto = [prompt + review.token_ids[:place] for prompt, review, place in arrived]
            logprobs = candidate_logprobs(self.fleet, self.checkpoint, upto, list(candidates.values())) if upto else []
        rows = iter(logprobs)
        return [None if place is None else np.array(next(rows)) for place in places]


def _longest(candidates: Mapping[int, list[int]]) -> int:
    """Return the number of tokens of the longest score."""
    return max(map(len, candidates.values()))


def balance(judgements: list[Judgement], rubric: Rubric) -> list[Judgement]:
    """Repeat the judgements of rare scores until every score that occurs is as frequent as the commonest."""
    by_score: dict[int, list[Judgement]] = {}
    for judgement in judgements:
        assert judgement.score is not None
        by_score.setdefault(whole_score(rubric, judgement.score), []).append(judgement)
    most = max(map(len, by_score.values()))
    balanced: list[Judgement] = []
    for _, group in sorted(by_score.items()):
        balanced += [group[i % len(group)] for i in range(most)]
    return balanced


def _pair_rows(judgements: list[Judgement], token_ids: Mapping[ResponseKey, list[int]]) -> list[dict[str, Any]]:
    """Pair the judged responses of each prompt, the higher score first; equal scores make no pair."""
    by_prompt: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        by_prompt.setdefault(judgement.prompt_id, []).append(judgement)
    rows: list[dict[str, Any]] = []
    for group in by_prompt.values():
        for a, b in combinations(group, 2):
            a_score, b_score = a.score or 0.0, b.score or 0.0
            # Bradley-Terry has no term for a tie.
            if math.isclose(a_score, b_score):
                continue
            chosen, rejected = (a, b) if a_score > b_score else (b, a)
            rows.append(
                {
                    "chosen_id": chosen.response_id,
                    "rejected_id": rejected.response_id,
                    "chosen_token_ids": token_ids[chosen.response_key],
                    "rejected_token_ids": token_ids[rejected.response_key],
                }
            )
    if not rows:
        raise DataError(
            'evaluator.loss = "bradley_terry" needs two paid responses of one prompt with different scores, and found '
            f"none among {len(judgements)} judgements of {len(by_prompt)} prompts; raise select.budget, or set "
            'evaluator.loss = "regression"'
        )
    return rows


def judge_prompt_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    policy: PolicyConfig,
    rubric: Rubric,
    prompt: str,
    response: str,
    scoring: Scoring,
) -> list[int]:
    """Tokenise what the generative evaluator reads."""
    rendered = render_judge_prompt(tokenizer, policy, rubric, prompt, response, scoring)
    return encode_prompt(tokenizer, rendered, policy.prompt_format)


def score_tokens(tokenizer: "PreTrainedTokenizerBase", rubric: Rubric) -> tuple[list[int], dict[int, list[int]]]:
    """Return the tokens with which all scores begin (a lone space, for example), and by score those that follow."""
    # The last token of an encoded response is the end of sequence, which is not part of a score.
    tokens = {score: encode_response(tokenizer, text)[:-1] for score, text in score_texts(rubric).items()}
    columns = zip(*(token_ids[:-1] for token_ids in tokens.values()), strict=False)
    num_shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    first = next(iter(tokens.values()))
    return first[:num_shared], {score: token_ids[num_shared:] for score, token_ids in tokens.items()}


def candidate_logprobs(
    fleet: Fleet, checkpoint: Checkpoint, prompts: list[list[int]], candidates: list[list[int]]
) -> list[list[float]]:
    """Read log p(candidate | prompt), (num_prompts, num_candidates).

    A prefill gives the probabilities of one next token, so it is enough where every candidate is one token. Otherwise
    the candidates' tokens form a tree, and there is one prefill per inner node, which weighs its branches.
    """
    totals = np.zeros((len(prompts), len(candidates)))
    inner_nodes = {tuple(candidate[:depth]) for candidate in candidates for depth in range(len(candidate))}
    for node in sorted(inner_nodes):
        depth = len(node)
        # Candidates that pass through this node, and the token by which each leaves it.
        through = [n for n, c in enumerate(candidates) if len(c) > depth and tuple(c[:depth]) == node]
        branches = sorted({candidates[n][depth] for n in through})
        upto = [prompt + list(node) for prompt in prompts]
        logprobs = np.array(fleet.call("next_token_logprobs", checkpoint, upto, branches))
        columns = [branches.index(candidates[n][depth]) for n in through]
        totals[:, through] += logprobs[:, columns]
    return totals.tolist()


def score_place(tokenizer: "PreTrainedTokenizerBase", review: Continuation, prefix: list[int]) -> int | None:
    """Return the index of the token that gives the score in a written review; None without a score."""
    written = upto_score(_text(tokenizer, review.token_ids))
    if written is None:
        return None
    # The fewest tokens whose text reaches the score: tokens and characters do not align otherwise.
    place = next(
        num_tokens
        for num_tokens in range(len(review.token_ids) + 1)
        if _text(tokenizer, review.token_ids[:num_tokens]).startswith(written)
    )
    if review.token_ids[place : place + len(prefix)] == prefix:
        place += len(prefix)
    return place if place < len(review.token_ids) else None


def _text(tokenizer: "PreTrainedTokenizerBase", token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))
