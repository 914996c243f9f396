"""One run as frozen pydantic models, read from one TOML file. A default is written once: here.

Importing this module loads no torch, ray or vllm, so that `--help`, `--plan` and a refusal take well under two seconds.
Values marked "ours" are not published for arXiv 2407.02119; see the README's table of open knobs.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayrl.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16"]
Unit = Literal["response", "prompt"]


class Table(BaseModel):
    """Base of every TOML table: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class PolicyConfig(Table):
    """The policy to align, M0."""

    path: str
    """A local folder or a hub id."""
    revision: str | None = None
    dtype: Dtype = "auto"
    """"auto" is bfloat16 where the accelerator has it, else float32."""
    prompt_format: Literal["auto", "plain", "chat"] = "auto"
    """"auto" is chat when the tokenizer has a chat template."""
    max_model_len: int | None = Field(default=None, gt=0)
    """Context in tokens; None is the model's own."""
    trust_remote_code: bool = False


class DataConfig(Table):
    """A file or data set of prompts: JSONL, JSON, CSV, Parquet (gzip'd too), a `save_to_disk` folder or a hub name."""

    path: str
    split: str = "train"
    prompt_column: str = "prompt"
    messages_column: str | None = None
    """A column of chat messages ({"role", "content"}); replaces `prompt_column`."""
    limit: int | None = Field(default=None, gt=0)
    """Use only the first `limit` rows."""


class SeedDataConfig(DataConfig):
    """Supervised seed data: prompts with responses."""

    response_column: str = "response"
    """Ignored with `messages_column`: there the last assistant message is the response."""
    score_column: str | None = None
    min_score: float | None = None
    """With `score_column`: keep only rows that score at least this (the paper's M1 is trained on high-reward rows)."""

    @model_validator(mode="after")
    def _score_needs_column(self) -> "SeedDataConfig":
        if (self.score_column is None) != (self.min_score is None):
            raise ValueError("score_column and min_score go together: set both or neither")
        return self


class PoolConfig(DataConfig):
    """The pool of unlabelled prompts, and which of them are held out for evaluation."""

    num_eval: int = Field(default=64, ge=0)
    """Prompts held out of the pool, chosen by the run's seed, for `evaluate`."""


class LoraConfig(Table):
    """Low-rank adapters instead of full fine-tuning; merged when the model is written."""

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class TrainingConfig(Table):
    """How one `fit()` trains. Batch size is the only size set in samples; micro-batches follow from tokens."""

    epochs: int = Field(default=1, gt=0)
    learning_rate: float = Field(default=1e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=64, gt=0)
    """Samples (or pairs) per optimizer step, over all workers."""
    micro_batch_tokens: int = Field(default=8192, gt=0)
    """Tokens, padding included, in one forward pass of one worker."""
    num_workers: int = Field(default=1, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 0
    cpu_offload: bool = False
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    checkpoint_every: int = Field(default=100, gt=0)
    """Steps between checkpoints."""
    max_failures: int = Field(default=3, ge=0)
    """Worker losses survived before the fit gives up."""


class SftConfig(TrainingConfig):
    """M0 -> M1 by supervised fine-tuning on the seed data, loss on the response only."""

    enabled: bool = True
    """False: the policy is M1 already."""
    learning_rate: float = Field(default=2e-5, gt=0)
    epochs: int = Field(default=3, gt=0)


class EngineConfig(Table):
    """A fleet of vLLM replicas of one kind."""

    num_replicas: int = Field(default=1, gt=0)
    tensor_parallel_size: int = Field(default=1, gt=0)
    gpus_per_replica: float = Field(default=1.0, ge=0)
    """Per tensor-parallel rank; a fraction puts several replicas on one GPU. Ignored on CPU machines."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    kv_cache_mb: int = Field(default=128, gt=0)
    """Key-value cache of a CPU replica."""
    threads: int = Field(default=1, gt=0)
    """Compute threads of a CPU replica."""
    max_num_seqs: int = Field(default=128, gt=0)
    engine_args: dict[str, Any] = {}
    """Passed to vLLM as they are."""


class GenerateConfig(Table):
    """On-policy sampling: k responses for each prompt."""

    source: Literal["policy", "seed"] = "policy"
    """"seed" is the off-policy control: the seed data's own responses are queried instead of M1's."""
    k: int = Field(default=4, gt=0)
    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 is off."""
    max_tokens: int = Field(default=512, gt=0)
    stop: list[str] = []
    block_size: int = Field(default=64, gt=0)
    """Prompts per block: the unit of work, of memoisation and of resume."""


class SelectConfig(Table):
    """Which responses the expert is asked about."""

    budget: int = Field(ge=1)
    """Paid queries. The paper's headline is 1,700."""
    strategy: Literal["k_center", "random"] = "k_center"
    unit: Unit = "response"
    """"prompt" asks about all k responses of a chosen prompt (budget // k prompts)."""
    text: Literal["prompt", "prompt_response", "judge_prompt"] = "prompt_response"
    """What is embedded: prompt_response is coresetIFT, judge_prompt is coresetEFT."""
    embedder: str = "policy"
    """"policy", or a sentence-embedding model's folder or hub id."""
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    """L2-normalise the vectors (ours)."""
    seed_centers: bool = False
    """Count the seed data as labelled already: initial centres."""
    num_shards: int = Field(default=1, gt=0)
    """Actors that own the vectors."""
    candidate_batch: int = Field(default=256, gt=0)
    """Farthest points offered per round; changes the speed, never the picks."""


class RubricConfig(Table):
    """What the expert and the evaluator are asked. A pointwise, additive scale."""

    template: str | None = None
    """File with the judge prompt; `{prompt}` and `{response}` are filled in. None is the built-in additive rubric."""
    min_score: int = 0
    max_score: int = 5

    @model_validator(mode="after")
    def _scale(self) -> "RubricConfig":
        if self.min_score >= self.max_score:
            raise ValueError("min_score must be below max_score")
        return self


class OracleLimits(Table):
    """How hard the expert may be pressed."""

    max_concurrency: int = Field(default=16, gt=0)
    requests_per_minute: int | None = Field(default=None, gt=0)
    tokens_per_minute: int | None = Field(default=None, gt=0)
    timeout_s: float = Field(default=120.0, gt=0)
    max_retries: int = Field(default=4, ge=0)
    """Tries after the first, with exponential backoff; then the query abstains."""


class HttpOracleConfig(OracleLimits):
    """Any OpenAI-compatible chat endpoint."""

    type: Literal["http"] = "http"
    base_url: str
    model: str
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable (or, with a leading "file:", the file) that holds the key; None sends no key."""
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=512, gt=0)
    usd_per_1m_input: float | None = Field(default=None, ge=0)
    usd_per_1m_output: float | None = Field(default=None, ge=0)
    budget_usd: float | None = Field(default=None, gt=0)
    """Hard limit over labels and evaluation; needs both prices."""

    @model_validator(mode="after")
    def _prices(self) -> "HttpOracleConfig":
        if (self.usd_per_1m_input is None) != (self.usd_per_1m_output is None):
            raise ValueError("usd_per_1m_input and usd_per_1m_output go together: set both or neither")
        if self.budget_usd is not None and self.usd_per_1m_input is None:
            raise ValueError("budget_usd needs usd_per_1m_input and usd_per_1m_output")
        return self


class ScriptedOracleConfig(OracleLimits):
    """A Python function `judge(prompt: str, response: str) -> (score, rationale)`; None as score abstains."""

    type: Literal["scripted"] = "scripted"
    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """"module:function", importable from the working directory."""


class ReplayOracleConfig(OracleLimits):
    """A table of judgements made earlier; what it does not hold abstains."""

    type: Literal["replay"] = "replay"
    path: str
    prompt_column: str = "prompt"
    response_column: str = "response"
    score_column: str = "score"
    rationale_column: str | None = None


OracleConfig = Annotated[HttpOracleConfig | ScriptedOracleConfig | ReplayOracleConfig, Field(discriminator="type")]


class EvaluatorConfig(TrainingConfig):
    """The proxy: trained on the paid judgements, it scores everything else."""

    type: Literal["generative", "scalar"] = "generative"
    scoring: Literal["score_first", "rationale_first"] = "score_first"
    """generative: read the score from one prefill, or write the rationale and read the score after it."""
    num_samples: int = Field(default=3, gt=0)
    """rationale_first: judgements sampled and averaged (Self-Rewarding LMs average 3)."""
    max_rationale_tokens: int = Field(default=160, gt=0)
    balanced: bool = False
    """generative: repeat rare scores until every score is as frequent as the commonest (ours)."""
    loss: Literal["regression", "bradley_terry"] = "regression"
    """scalar: squared error on the scores, or Bradley-Terry on pairs within a prompt (needs select.unit = "prompt")."""
    holdout: float = Field(default=0.15, gt=0, lt=1)
    """Share of the paid judgements kept back to validate the evaluator."""
    learning_rate: float = Field(default=1e-5, gt=0)
    epochs: int = Field(default=3, gt=0)
    batch_size: int = Field(default=16, gt=0)


class PseudoLabelConfig(Table):
    """From scored responses to preference pairs."""

    pairing: Literal["best_worst", "margin"] = "best_worst"
    min_margin: float = Field(default=0.0, ge=0)
    """Pairs whose scores differ by this or less are ties and are dropped."""
    mode: Literal["auto", "overlap", "alternate"] = "auto"
    """Score while DPO's first epoch trains, or before it. "auto" takes overlap when both fit the cluster at once."""


class DpoConfig(TrainingConfig):
    """M1 -> M2 by direct preference optimisation (arXiv 2305.18290)."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    length_normalised: bool = False
    reference: Literal["auto", "generation", "pass"] = "auto"
    """Reference log-probabilities from generation (exact in float32), or from one pass before the first step."""


class LmEvalConfig(Table):
    """Optional benchmark tasks through lm-evaluation-harness and its vLLM backend."""

    tasks: list[str] = []
    include_path: str | None = None
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, gt=0)


class ReferenceAnswersConfig(DataConfig):
    """A fixed table of reference answers to compete with."""

    response_column: str = "response"


class EvaluateConfig(Table):
    """M2 against M1 on held-out prompts, under a budget of its own."""

    budget: int = Field(default=128, ge=0)
    """Paid evaluation queries; two per prompt (three with reference answers). 0 skips the expert."""
    temperature: float = Field(default=0.7, ge=0)
    reference_answers: ReferenceAnswersConfig | None = None
    lm_eval: LmEvalConfig = LmEvalConfig()


class RunConfig(Table):
    """One run of the proxy-reward pipeline."""

    name: str = Field(pattern=r"^[\w.-]+$")
    run_dir: str
    """Folder of this run: a local path, NFS, or any fsspec URL."""
    seed: int = Field(default=0, ge=0)
    reuse: str | None = None
    """Another run's folder: its finished stages with identical inputs are taken over instead of done again."""
    labels: Literal["proxy", "direct", "expert", "shuffled"] = "proxy"
    """proxy is the method. Controls: "direct" (DPO on the paid judgements alone), "expert" (the expert labels
    everything: the ceiling), "shuffled" (the paid scores are permuted: the floor)."""

    policy: PolicyConfig
    seed_data: SeedDataConfig | None = None
    pool: PoolConfig
    sft: SftConfig = SftConfig()
    generators: EngineConfig = EngineConfig()
    embedders: EngineConfig = EngineConfig()
    generate: GenerateConfig = GenerateConfig()
    select: SelectConfig
    rubric: RubricConfig = RubricConfig()
    oracle: OracleConfig
    evaluator: EvaluatorConfig = EvaluatorConfig()
    pseudo_label: PseudoLabelConfig = PseudoLabelConfig()
    dpo: DpoConfig = DpoConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> "RunConfig":
        for broken, message in (
            (
                self.pseudo_label.pairing == "best_worst" and self.generate.k < 2,
                f'generate.k must be at least 2 when pseudo_label.pairing is "best_worst", got {self.generate.k}',
            ),
            (
                self.seed_data is None and (self.sft.enabled or self.generate.source == "seed"),
                "seed_data is missing: sft and the off-policy control need it; add a [seed_data] table "
                "or set sft.enabled = false",
            ),
            (
                self.labels == "direct" and self.select.unit != "prompt",
                'labels = "direct" pairs only paid responses, so select.unit must be "prompt", got "response"',
            ),
            (
                self.evaluator.type == "scalar"
                and self.evaluator.loss == "bradley_terry"
                and self.select.unit != "prompt",
                'evaluator.loss = "bradley_terry" needs pairs of paid responses: set select.unit = "prompt"',
            ),
            (
                self.select.unit == "prompt" and self.select.budget < self.generate.k,
                f'select.budget must be at least generate.k ({self.generate.k}) when select.unit is "prompt", '
                f"got {self.select.budget}",
            ),
        ):
            if broken:
                raise ValueError(message)
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a TOML file, merge dotted `key=value` overrides (values are TOML expressions), and check everything.

    Raises:
        ConfigError: one message that names field, rule, value and remedy for every mistake found.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; jobs/configs/ holds examples")
    try:
        tree = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for override in overrides or []:
        _merge(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path} is refused:\n" + "\n".join(_explain(error))) from None


def _merge(tree: dict[str, Any], override: str) -> None:
    dotted, equals, expression = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r} must look like section.key=value")
    try:
        value = tomllib.loads(f"value = {expression}")["value"]
    except tomllib.TOMLDecodeError:
        value = expression  # a bare word is a string, so that a shell user need not quote twice
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
    tree[key] = value


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        field = ".".join(location) or "config"
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(location[-1], _known_keys(location[:-1]), n=1, cutoff=0.5)
            lines.append(f"  {field}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
        elif item["type"] == "missing":
            lines.append(f"  {field}: required, and missing")
        elif item["type"] == "value_error":
            lines.append(f"  {field}: {item['msg'].removeprefix('Value error, ')}")
        else:
            rule = item["msg"][0].lower() + item["msg"][1:]
            lines.append(f"  {field}: {rule}, got {item['input']!r}")
    return lines


def _known_keys(location: list[str]) -> list[str]:
    """Names allowed at a place of the tree; walks the models the way pydantic reported the place."""
    models: list[Any] = [RunConfig]
    for part in location:
        nested = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        found = [model for annotation in nested for model in _models_in(annotation)]
        models = found or models  # a discriminator's tag is part of the location but no field
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [model for argument in arguments for model in _models_in(argument)]
