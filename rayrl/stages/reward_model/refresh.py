"""Refresh of the reward model, r -> r^: made to fit the policy's own samples, without a new label (RLP, Sec. 4).

Not a stage: it chooses which stages run, by `refresh.method`. A method is a function here and an entry in `METHODS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from rayrl.data.blocks import BlockTable
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.runs.stage_table import REFIT_REWARD_MODEL, SAMPLES, num_refresh_blocks
from rayrl.stages.artifacts import Pool, Preferences, Responses
from rayrl.stages.reward_model.fit_reward_model import fit_reward_model
from rayrl.stages.reward_model.importance import importance_weights
from rayrl.stages.reward_model.training_data import PairWeights
from rayrl.stages.rewards.protocol import Reward
from rayrl.stages.rewards.reward_models import RewardModels
from rayrl.stages.sampling.generate import generate, sampling_of
from rayrl.stages.synthesis.synthesize import self_judge, synthesize_preferences


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """Inputs of every method, and the stages that methods share."""

    run: Run
    services: Services
    m1: Checkpoint
    """Checkpoint from which every reward model starts."""
    policy: Checkpoint
    """pi, trained with r; its samples are what r^ must fit."""
    preferences: Preferences
    """D."""
    r: RewardModels
    """The reward that pi was trained with."""
    pool: Pool
    """The prompts U."""

    def samples(self) -> Responses:
        """Sample Y: n responses of pi to the unlabelled prompts."""
        return sample_policy(self.run, self.services, self.policy, self.pool)

    def synthetic(self, reward: Reward) -> Preferences:
        """Make D^: preference pairs from a reward and Y, without a label."""
        return synthesize_preferences(self.run, self.services, self.m1, reward, self.samples())

    def weights(self) -> PairWeights:
        """Weigh D's pairs towards the responses of pi."""
        return importance_weights(self.run, self.services, self.m1, self.policy, self.preferences)

    def fit(
        self,
        *synthetic: Preferences,
        views: Responses | None = None,
        weights: PairWeights | None = None,
    ) -> RewardModels:
        """Fit r^ from M1, on D and what the method adds."""
        preferences = [self.preferences, *synthetic]
        return fit_reward_model(
            self.run,
            self.services,
            self.m1,
            preferences,
            stage=REFIT_REWARD_MODEL,
            views=views,
            weights=weights,
        )


def by_synthetic_pairs(given: Refresh) -> RewardModels:
    """Fit on D and D^: SPG, and the control whose pairs r ranks ("reward_pairs")."""
    return given.fit(given.synthetic(given.r))


def by_own_judgements(given: Refresh) -> RewardModels:
    """Fit on D and pairs that the policy itself judges (RLAIF, a control)."""
    return given.fit(given.synthetic(self_judge(given.run, given.policy)))


def by_views(given: Refresh) -> RewardModels:
    """Fit on D with an information bottleneck on two samples of every prompt (UML)."""
    return given.fit(views=given.samples())


def by_importance(given: Refresh) -> RewardModels:
    """Fit on D with its pairs weighted towards the responses of pi (off-policy correction, a control)."""
    return given.fit(weights=given.weights())


def keep_r(given: Refresh) -> RewardModels:
    """Return the old r: the control of a second PPO on it."""
    return given.r


METHODS: dict[str, Callable[[Refresh], RewardModels]] = {
    "spg": by_synthetic_pairs,
    "uml": by_views,
    "reward_pairs": by_synthetic_pairs,
    "self_judged": by_own_judgements,
    "ocrm": by_importance,
    "none": keep_r,
}
"""Values of `refresh.method`."""


def refresh(
    run: Run,
    services: Services,
    m1: Checkpoint,
    policy: Checkpoint,
    preferences: Preferences,
    r: RewardModels,
    pool: Pool,
) -> RewardModels:
    """Make r^ by `refresh.method`.

    Args:
        run: the run.
        services: fleets.
        m1: where every reward model starts.
        policy: pi, trained with r; its samples are what r^ must fit.
        preferences: D.
        r: the reward that pi was trained with.
        pool: the prompts U.
    """
    method = METHODS[run.config.refresh.method]
    return method(Refresh(run=run, services=services, m1=m1, policy=policy, preferences=preferences, r=r, pool=pool))


def sample_policy(run: Run, services: Services, policy: Checkpoint, pool: Pool) -> Responses:
    """Sample Y: n responses of pi to every unlabelled prompt, or to `refresh.num_prompts` of them in whole blocks."""
    config = run.config
    num_blocks = num_refresh_blocks(config.refresh.num_prompts, config.generate.block_size, pool.train.num_blocks)
    part = replace(pool, key=f"{pool.key}-{num_blocks}", train=BlockTable(pool.train.url, num_blocks))
    # The whole distribution of pi, whatever the labelled responses were sampled with: r^ has to score rollouts of pi.
    sampling = replace(sampling_of(config.generate), temperature=config.refresh.temperature, top_p=1.0)
    return generate(run, services, policy, part, stage=SAMPLES, k=config.refresh.n, sampling=sampling)
