"""Settings of the evaluation on held-out prompts."""

from pydantic import Field, model_validator

from rayrl.config.data import ReferenceAnswersConfig
from rayrl.config.table import Growing, Place, Table

MIN_DIAGNOSIS = 36
"""Least `evaluate.diagnosis_budget` above 0: 9 points x 2 answers, twice."""


class LmEvalConfig(Table):
    """Optional benchmark tasks through lm-evaluation-harness and its vLLM backend."""

    tasks: list[str] = Field(default=[])
    """Names of tasks; none runs no benchmark."""
    include_path: Place | None = None
    """A folder with task definitions of one's own."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in each prompt; None is the task's own number."""
    limit: int | None = Field(default=None, gt=0)
    """Use only the first `limit` documents of each task."""


class EvaluateConfig(Table):
    """Evaluation of the policies on held-out prompts, under a budget of its own."""

    budget: Growing[int] = Field(default=128, ge=0)
    """Paid evaluation queries: a score of every policy's answer to a prompt, and with reference answers a comparison of
    each with the reference (two with order = "both"), or a score of the reference. As many prompts are judged as it
    pays for whole; 0 asks the oracle nothing."""
    diagnosis_budget: Growing[int] = Field(default=0, ge=0)
    """rlp: paid queries beyond `budget` for measurements that the paper leaves out: half for the accuracy of the reward
    models on the policies' own samples along PPO, half for the quality of the synthetic pairs at each gamma."""
    best_of_n: int = Field(default=0, ge=0)
    """rlp: another policy in the table, the control that trains nothing: M1's best of n answers by the reward model.
    0 leaves it out."""
    temperature: float = Field(default=0.7, ge=0)
    """Of the answers, beside generate.top_p and generate.top_k. The KL is of the policy itself: unless the answers are
    sampled at temperature 1 and top_p 1, it is measured on another sample for each held-out prompt."""
    reference_answers: ReferenceAnswersConfig | None = None
    """Answers that all policies compete with on the held-out prompts that have one. An oracle that cannot compare (no
    `oracle.compare_function` or `comparisons_path`; `rubric.template` without `pairwise_template`) scores both."""
    lm_eval: LmEvalConfig = LmEvalConfig()

    @model_validator(mode="after")
    def _enough(self) -> "EvaluateConfig":
        if 0 < self.diagnosis_budget < MIN_DIAGNOSIS:
            raise ValueError(
                f"evaluate.diagnosis_budget must be 0 or at least {MIN_DIAGNOSIS} (M1 and four points of each PPO, two "
                f"answers each, and as much for the synthetic pairs), got {self.diagnosis_budget}"
            )
        if self.best_of_n == 1:
            raise ValueError("evaluate.best_of_n must be 0 or at least 2, got 1: the best of one answer is M1's answer")
        return self
