"""Stages fit_reward_model and refit_reward_model: r from preferences D, and r^ from D and the policy's own samples.

L = E_{D u D^}[-log sigma(r(x, y_w) - r(x, y_l))] + lambda L_M (arXiv 2403.19279, Sec. 4), Bradley-Terry from M1: D^
comes as more preferences, L_M with views. Every fit on the same D is validated on the same held-out pairs of D.

The members of an ensemble are fitted one after another, each a stage of its own that a resumed run finds done.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rayrl.data.blocks import BlockTable
from rayrl.data.tokenizing import context_length
from rayrl.engines.embedder import HEAD_FILE
from rayrl.errors import DataError
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint, content_id, drawn_seed, to_table
from rayrl.runs import storage
from rayrl.runs.run import Manifest, Run
from rayrl.runs.stage_metrics import FitMetrics, RewardModelMetrics
from rayrl.runs.stage_table import FIT_REWARD_MODEL, Stage
from rayrl.stages.artifacts import Preferences, Responses
from rayrl.stages.fitting import fit_stage, losses_of, stream_of
from rayrl.stages.reward_model.training_data import PairWeights, TrainingData, TrainingPair, training_data
from rayrl.stages.reward_model.validation import finish_reward_model, measure_reward_models, with_standards
from rayrl.stages.rewards.reward_models import RewardModels
from rayrl.training.reward_model import RewardModelJob, train_reward_model
from rayrl.training.views import Views, prompts_with_views

COMBINING = frozenset({"objective", "variance_coef"})
"""Settings that combine the members' rewards. No member depends on them, and none is fitted anew when they change."""


def fit_reward_model(
    run: Run,
    services: Services,
    m1: Checkpoint,
    preferences: Sequence[Preferences],
    *,
    stage: Stage[RewardModelMetrics] = FIT_REWARD_MODEL,
    views: Responses | None = None,
    weights: PairWeights | None = None,
) -> RewardModels:
    """Fit `reward_model.num_members` models, each from M1 with a seed of its own, and measure them.

    With `reward_model.path` the fit on D alone is that model's adoption; every other one is a refresh, and fitted.

    Args:
        run: the run.
        services: fleets; the embedding replicas serve the validation.
        m1: where the backbones start.
        preferences: D, then what is unioned with it. Held-out pairs are D's alone, and nothing trains on their prompts.
        stage: the entry of the stage table that this work is; a refreshed reward model has its own.
        views: responses to unlabelled prompts: adds lambda L_M (`refresh.uml`).
        weights: of D's pairs; pairs unioned with it weigh 1.

    Raises:
        DataError: no pair to train or validate on, or too few prompts with two views.
    """
    config = run.config.reward_model
    is_on_d_alone = len(preferences) == 1 and views is None and weights is None
    if config.path is not None and is_on_d_alone:
        return adopt_reward_model(run, services, m1, preferences, stage=stage)

    uml = run.config.refresh.uml if views else "no views"
    sources = [source.key for source in (*preferences, views, weights) if source is not None]
    inputs = [uml, run.config.policy.max_model_len, services.dtype, m1.version, *sources]
    # By the stage's name: the engines measure an ensemble, and no training of a member depends on them.
    member_key = run.key(stage.name, "member", config.science_json(exclude=COMBINING), *inputs)
    key = run.key(stage, config, *inputs)

    members = [stage.member(i) for i in range(config.num_members)]
    checkpoints: list[Checkpoint] = []
    for member in members:
        path = run.folder(member, "checkpoint")
        checkpoints.append(Checkpoint(path=path, version=f"{member.name}-{member_key}"))
    models = RewardModels(key=key, checkpoints=tuple(checkpoints), m1=m1, config=run.config)
    # An interrupted ensemble goes on with the members that are missing.
    fits = [run.finished(member, member_key) for member in members]
    # Looked for in any case: what other work has left goes away before the fits, and not after them.
    done = run.finished(stage, key)
    if done is None or not all(fits):
        started = time.monotonic()
        data = training_data(run, stage, preferences, weights)
        job = _job(run, services, m1, data, views)
        if config.evaluate_every is not None:
            job = replace(job, held_out=_held_out_rows(run, stage, data))
        curves: list[FitMetrics | None] = []
        for i, (member, fit) in enumerate(zip(members, fits, strict=True)):
            if fit is None:
                job = replace(job, stage=member.name, checkpoint_url=checkpoints[i].path, seed=member_seed(run.seed, i))
                fit = _fit_member(run, services, member, job, data, member_key)
            curves.append(fit.metrics)
        metrics = measure_reward_models(run, services, models, data, curves)
        done = finish_reward_model(run, stage, key, started, metrics)
    return with_standards(models, done.metrics)


def adopt_reward_model(
    run: Run,
    services: Services,
    m1: Checkpoint,
    preferences: Sequence[Preferences],
    *,
    stage: Stage[RewardModelMetrics],
) -> RewardModels:
    """Take the ready-made model `reward_model.path` as r, measured as if it had been fitted on these preferences."""
    assert run.config.reward_model.path is not None
    path = storage.absolute(run.config.reward_model.path)
    # The head is small and no two fits have the same one: it tells models at the same path apart.
    head = (Path(storage.local_folder(path)) / HEAD_FILE).read_bytes().hex()
    version = content_id(path, head, *run.content("reward_model."))
    model = Checkpoint(path=path, version=f"reward-model-{version}")
    sources = [source.key for source in preferences]
    key = run.key(stage, model.version, run.config.reward_model, run.config.policy.max_model_len, *sources)
    models = RewardModels(key=key, checkpoints=(model,), m1=m1, config=run.config)
    done = run.finished(stage, key)
    if done is None:
        started = time.monotonic()
        data = training_data(run, stage, preferences, None)
        metrics = measure_reward_models(run, services, models, data, [None])
        done = finish_reward_model(run, stage, key, started, metrics)
    return with_standards(models, done.metrics)


def member_seed(seed: int, member: int) -> int:
    """Draw the seed of one member's training: r and r^ of one run share it, two runs do not."""
    return drawn_seed("member", str(seed), str(member))


def _job(run: Run, services: Services, m1: Checkpoint, data: TrainingData, views: Responses | None) -> RewardModelJob:
    """Make the job that all members share; each adds its stage, its seed and the place of its checkpoint."""
    config = run.config
    return RewardModelJob(
        stage="",
        run_url=run.url,
        checkpoint_url="",
        policy=config.policy,
        start=m1,
        training=config.reward_model,
        pooling="last",
        dtype=services.dtype,
        seed=run.seed,
        num_rows=data.num_rows,
        # From the same zero head, members would differ by the order of their batches only.
        random_head=config.reward_model.num_members > 1,
        bottleneck=config.reward_model.bottleneck,
        views=None if views is None else _views(run, views),
    )


def _held_out_rows(run: Run, stage: Stage[RewardModelMetrics], data: TrainingData) -> BlockTable:
    """Write the rows of the held-out pairs, for the evaluations of all members.

    Raises:
        DataError: there is none.
    """
    if not data.held_out_rows:
        raise DataError(
            "reward_model.evaluate_every has no held-out pair to evaluate on: both sides of each are the same up to "
            "the context; raise policy.max_model_len or reward_model.holdout, or leave reward_model.evaluate_every out"
        )
    table = BlockTable(run.folder(stage, "held_out"), 1)
    table.write(0, to_table(data.held_out_rows, TrainingPair))
    return table


def _views(run: Run, responses: Responses) -> Views:
    """Make views of the samples, and refuse too few of them here rather than in the workers."""
    num_needed = 2 * run.config.reward_model.num_workers
    uml = run.config.refresh.uml
    # Counted only as far as needed: the table may be large.
    num_found = len(list(islice(prompts_with_views(responses.table), uml.batch_size)))
    if num_found < num_needed:
        raise DataError(
            f"multi-view learning needs at least {num_needed} prompts with two different responses (2 per worker), "
            f"got {num_found}; raise refresh.n, refresh.num_prompts or refresh.temperature"
        )
    max_tokens = context_length(run.config.policy)
    # A batch is never short: of fewer prompts, each step takes them all.
    return Views(table=responses.table, uml=uml, batch_size=num_found, max_tokens=max_tokens)


def _fit_member(
    run: Run, services: Services, member: Stage[FitMetrics], job: RewardModelJob, data: TrainingData, key: str
) -> Manifest[FitMetrics]:
    started = time.monotonic()
    stream = stream_of(data.rows, job.seed)
    fit = fit_stage(run, services, member, train_reward_model, job, job.training, stream)
    return run.finish(
        member,
        key,
        since=started,
        num_rows=data.num_rows,
        metrics=fit,
        summary=f"{data.num_rows} pairs, {losses_of(fit)}",
    )
