"""Judge prompts that a model of the run reads: room for the rubric, and how many may be too long for the context.

They are read by a generative evaluator, and by a policy that judges itself. One that is too long is an abstention.
"""

from dataclasses import dataclass

from rayrl.config import RunConfig
from rayrl.data.judge_prompts import render_judge_prompt
from rayrl.errors import ConfigError
from rayrl.models.judge_prompt import Rubric, score_texts
from rayrl.preflight.inputs import PoolFacts, count_tokens
from rayrl.preflight.model import ModelFacts
from rayrl.runs.stage_table import fits_evaluator


@dataclass(frozen=True, kw_only=True)
class JudgePromptFacts:
    """Facts of the judge prompts about the pool."""

    num_prompts: int
    num_too_long: int
    """Prompts, at most, on whose longest responses the model abstains."""
    longest_tokens: int
    """Tokens of the longest judge prompt with a response of generate.max_tokens and the answer to it."""
    max_model_len: int
    remedy: str

    def warnings(self) -> list[str]:
        """Say how many judge prompts may be too long."""
        if not self.num_too_long:
            return []
        return [
            f"judge prompts: up to {self.num_too_long:,} of {self.num_prompts:,} prompts, with the rubric and a "
            f"response of generate.max_tokens, exceed the context of {self.max_model_len:,} tokens (the longest has "
            f"{self.longest_tokens:,}): such responses get no score, whatever was paid for labels; {self.remedy}"
        ]


def inspect_judge_prompts(
    config: RunConfig, rubric: Rubric, model: ModelFacts, pool: PoolFacts
) -> JudgePromptFacts | None:
    """Count the judge prompts that may be too long; None if no model of the run reads one, or nothing is known of it.

    Raises:
        ConfigError: the rubric alone, or with any prompt of the pool, leaves no room for a response.
    """
    judges_itself = config.learns_from_comparisons and config.refresh.method == "self_judged"
    evaluator_reads_it = fits_evaluator(config) and config.evaluator.served_by == "generators"
    if not judges_itself and not evaluator_reads_it:
        return None
    if model.tokenizer is None or model.max_model_len is None:
        return None
    tokenizer, limit = model.tokenizer, model.max_model_len
    scoring = config.evaluator.scoring

    def count(*prompts: str) -> list[int]:
        """Count the tokens of judge prompts without a response."""
        rendered = [render_judge_prompt(tokenizer, config.policy, rubric, prompt, "", scoring) for prompt in prompts]
        return count_tokens(config, model, rendered)

    other = "another refresh.method" if judges_itself else 'evaluator.type = "scalar"'
    (num_rubric,) = count("")
    if num_rubric >= limit:
        raise ConfigError(
            f"rubric.template must leave room in the context of {limit} tokens, and has {num_rubric} alone; give a "
            f"shorter template, or set {other}"
        )
    remedy = (
        "raise policy.max_model_len if the model allows it, shorten rubric.template, lower generate.max_tokens, or set "
        f"{other}"
    )
    num_score = max(count_tokens(config, model, list(score_texts(rubric).values())))
    # A rationale that comes after the score is never written: reading the score is all that is needed.
    num_answer = num_score + (config.evaluator.max_rationale_tokens if scoring == "rationale_first" else 0)
    num_tokens = count(*(prompt.text for prompt in pool.longest))
    num_prompts = pool.counts.num_kept
    # Only the longest are measured: the shortest of a larger pool are not among them.
    is_whole_pool = len(num_tokens) == num_prompts
    if is_whole_pool and min(num_tokens) + num_score >= limit:
        raise ConfigError(
            f"rubric.template must leave room for a prompt and a response in the context of {limit} tokens, and has "
            f"{num_rubric} alone, {min(num_tokens)} with the shortest prompt of the pool; {remedy}"
        )
    longest = max(num_tokens) + config.generate.max_tokens + num_answer
    num_too_long = sum(num + config.generate.max_tokens + num_answer > limit for num in num_tokens)
    return JudgePromptFacts(
        num_prompts=num_prompts,
        # If all that were measured are too long, any other may be.
        num_too_long=num_prompts if num_too_long == len(num_tokens) else num_too_long,
        longest_tokens=longest,
        max_model_len=limit,
        remedy=remedy,
    )
