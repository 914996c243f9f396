"""Stage fit_reward_model: r from preferences D (Bradley-Terry from M1), and r^ from D and what the policy itself says.

L = E_{D u D^}[-log sigma(r(x, y_w) - r(x, y_l))] + lambda L_M (arXiv 2403.19279, Sec. 4): D^ comes as more preferences,
L_M with views. Every fit on the same D is validated on the same held-out pairs of D.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rayrl.data.tokenizing import context_length
from rayrl.engines.embedder import HEAD_FILE
from rayrl.errors import DataError
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint, content_id
from rayrl.runs import storage
from rayrl.runs.run import Manifest, Run
from rayrl.stages.artifacts import Preferences, Responses
from rayrl.stages.fitting import fit_stage, stream_of
from rayrl.stages.reward_model.training_data import PairWeights, TrainingData, training_data
from rayrl.stages.reward_model.validation import finish, measure, measured
from rayrl.stages.rewards.reward_models import RewardModels
from rayrl.training.reward_model import RewardModelJob, train_reward_model
from rayrl.training.views import Views, prompts_with_views


def fit_reward_model(
    run: Run,
    services: Services,
    m1: Checkpoint,
    preferences: Sequence[Preferences],
    *,
    stage: str = "fit_reward_model",
    views: Responses | None = None,
    weights: PairWeights | None = None,
) -> RewardModels:
    """r: `reward_model.num_members` models, each from M1 with a seed of its own; the manifest says what they are worth.

    With `reward_model.path` the fit on D alone is that model's adoption; every other one is a refresh, and fitted.

    Args:
        run: the run.
        services: fleets; the embedding replicas serve the validation.
        m1: where the backbones start.
        preferences: D, then what is unioned with it. Held-out pairs are D's alone, and nothing trains on their prompts.
        stage: name of the stage; a refreshed reward model has its own. Member i is the stage `<stage>-<i>`.
        views: responses to unlabelled prompts: adds lambda L_M (`refresh.uml`).
        weights: of D's pairs; pairs unioned with it weigh 1.

    Raises:
        DataError: no pair to train or validate on, or too few prompts with two views.
    """
    config = run.config.reward_model
    if config.path is not None and len(preferences) == 1 and views is None and weights is None:
        return adopt_reward_model(run, services, m1, preferences, stage=stage)
    alike = config.model_copy(update={"objective": "mean", "variance_coef": 0.0})  # members do not depend on these
    uml = run.config.refresh.uml if views else None
    sources = [source.key for source in (*preferences, views, weights) if source is not None]
    inputs = [alike, uml or "no views", run.config.policy.max_model_len, services.dtype, m1.version, *sources]
    member_key, key = run.key(f"{stage}-member", *inputs), run.key(stage, config, *inputs)
    names = [f"{stage}-{i}" for i in range(config.num_members)]
    members = [Checkpoint(path=run.folder(name, "checkpoint"), version=f"{name}-{member_key}") for name in names]
    models = RewardModels(key=key, checkpoints=tuple(members), m1=m1, config=run.config)
    fitted = [run.finished(name, member_key) for name in names]
    done = run.finished(stage, key) if all(fitted) else None
    if done is None:
        started = time.monotonic()
        data = training_data(run, stage, preferences, weights)
        job = _job(run, services, m1, data, views)
        curves = []
        for i, name in enumerate(names):
            job = replace(job, stage=name, checkpoint_url=members[i].path, seed=member_seed(run.config.seed, i))
            done = fitted[i] or _fit_member(run, services, job, data, member_key)
            curves.append(done.metrics)
        metrics = measure(run, services, models, data)
        metrics["members"] = [curve | member for curve, member in zip(curves, metrics["members"], strict=True)]
        done = finish(run, stage, key, started, metrics)
    return measured(models, done)


def adopt_reward_model(
    run: Run, services: Services, m1: Checkpoint, preferences: Sequence[Preferences], *, stage: str
) -> RewardModels:
    """r: the ready-made model `reward_model.path`, measured as if it had been fitted on these preferences."""
    path = run.config.reward_model.path
    assert path is not None
    path = storage.absolute(path)
    head = (Path(storage.local_folder(path)) / HEAD_FILE).read_bytes().hex()
    model = Checkpoint(path=path, version=f"reward-model-{content_id(path, head)}")
    sources = [source.key for source in preferences]
    key = run.key(stage, model.version, run.config.reward_model, run.config.policy.max_model_len, *sources)
    models = RewardModels(key=key, checkpoints=(model,), m1=m1, config=run.config)
    done = run.finished(stage, key)
    if done is None:
        started = time.monotonic()
        data = training_data(run, stage, preferences, None)
        done = finish(run, stage, key, started, measure(run, services, models, data))
    return measured(models, done)


def member_seed(seed: int, member: int) -> int:
    """Seed of one member's training: r and r^ of one run share it, two runs do not."""
    return int(content_id("member", str(seed), str(member)), 16) >> 1


def _job(run: Run, services: Services, m1: Checkpoint, data: TrainingData, views: Responses | None) -> RewardModelJob:
    """The job of member 0."""
    config = run.config
    drawn = None
    if views is not None:
        drawn = Views(table=views.table, uml=config.refresh.uml, max_tokens=context_length(config.policy))
        needed = 2 * config.reward_model.num_workers
        if (num := len(list(islice(prompts_with_views(views.table), needed)))) < needed:
            raise DataError(
                f"multi-view learning needs at least {needed} prompts with two different responses (2 per worker), "
                f"got {num}; raise refresh.n, refresh.num_prompts or refresh.temperature"
            )
    return RewardModelJob(
        stage="",
        run_url=run.url,
        checkpoint_url="",
        policy=config.policy.model_copy(update={"path": m1.path, "revision": None}),
        training=config.reward_model,
        pooling="last",
        dtype=services.dtype,
        seed=config.seed,
        num_rows=data.num_rows,
        random_head=config.reward_model.num_members > 1,
        views=drawn,
    )


def _fit_member(run: Run, services: Services, job: RewardModelJob, data: TrainingData, key: str) -> Manifest:
    started = time.monotonic()
    stream = stream_of(data.rows, job.seed)
    curve = fit_stage(run, services, job.stage, train_reward_model, job, job.training, stream)
    return run.finish(
        job.stage,
        key,
        since=started,
        num_rows=data.num_rows,
        metrics=curve,
        summary=f"{data.num_rows} pairs, loss {curve['first_loss']:.3f} -> {curve['final_loss']:.3f}",
    )
