"""TRL's side of the benchmark of trainings: its trainers on given tokens, timed by optimizer step."""

import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback, TrainerCallback
from trl.trainer import dpo_config, dpo_trainer, reward_config, reward_trainer, sft_config, sft_trainer

from rayrl.models.policy import load_policy
from rayrl.records import Checkpoint

QUICKSTART = "jobs/quickstart/model"
LEARNING_RATE = 1e-5
Row = Any
"""A pair: prompt_token_ids, chosen_token_ids and rejected_token_ids."""


class Round(NamedTuple):
    """One pass over the rows, its first step left out."""

    seconds: float
    num_tokens: int
    """Without padding."""
    num_allocated: int
    """With it."""


class Clock(TrainerCallback):
    """Callback that keeps the time at which each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


class Theirs:
    """One of TRL's trainers, on the same tokens, given in the columns that its own preparation makes."""

    def __init__(
        self,
        training: str,
        path: str,
        rows: list[Row],
        batch_size: int,
        micro_batch: int,
        *,
        padding_free: bool = False,
        use_cpu: bool = True,
    ):
        self.accumulation = batch_size // micro_batch
        self.clock = Clock()
        self.sizes: list[tuple[int, int]] = []
        shared: dict[str, Any] = {
            "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": micro_batch, "num_train_epochs": 1,
            "gradient_accumulation_steps": self.accumulation, "gradient_checkpointing": False, "bf16": False,
            "use_cpu": use_cpu, "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no",
            "disable_tqdm": True, "dataloader_pin_memory": False, "max_length": None, "logging_steps": 10_000,
            "learning_rate": LEARNING_RATE,
        }  # fmt: skip
        self.trainer = TRAINERS[training](path, shared, padding_free)
        self.trainer.add_callback(self.clock)
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.data_collator = self.counting(self.trainer.data_collator)
        self.trainer.train_dataset = Dataset.from_list([COLUMNS[training](row) for row in rows])

    def counting(self, collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
        """Return TRL's collator, which also keeps the size of every micro-batch."""

        def counted(examples: list[Any]) -> dict[str, Any]:
            batch = collate(examples)
            num_allocated = batch["input_ids"].numel()
            mask = batch.get("attention_mask")  # without padding there is none
            self.sizes.append((num_allocated if mask is None else int(mask.sum()), num_allocated))
            return batch

        return counted

    def round(self) -> Round:
        self.sizes.clear()
        self.clock.ends.clear()
        self.trainer.train()
        later = self.sizes[self.accumulation :]
        return Round(self.clock.ends[-1] - self.clock.ends[0], sum(n for n, _ in later), sum(n for _, n in later))


def load(path: str) -> Any:
    """Load the causal language model of a folder in float32."""
    return load_policy(Checkpoint(path=path, version=path), torch.float32)


def sft(path: str, shared: dict[str, Any], padding_free: bool) -> Any:
    """Make the trainer for prompts and responses."""
    arguments = sft_config.SFTConfig(**shared, padding_free=padding_free)
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}])
    return sft_trainer.SFTTrainer(
        model=load(path), args=arguments, processing_class=AutoTokenizer.from_pretrained(QUICKSTART), train_dataset=rows
    )


def reward_model(path: str, shared: dict[str, Any], padding_free: bool) -> Any:
    """Make the trainer for pairs of sequences."""
    assert not padding_free, "TRL's reward models are padded"
    arguments = reward_config.RewardConfig(**shared, disable_dropout=False)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = 0
    rows = Dataset.from_list([{"chosen_ids": [1, 2], "rejected_ids": [1, 3]}])
    return reward_trainer.RewardTrainer(
        model=model, args=arguments, processing_class=AutoTokenizer.from_pretrained(QUICKSTART), train_dataset=rows
    )


def dpo(path: str, shared: dict[str, Any], padding_free: bool) -> Any:
    """Make the trainer for pairs with the reference's log-probabilities."""
    assert not padding_free, "TRL 1.16 has turned its padding-free DPO off"
    arguments = dpo_config.DPOConfig(**shared, precompute_ref_log_probs=True)
    return dpo_trainer.DPOTrainer(
        model=load(path), args=arguments, processing_class=AutoTokenizer.from_pretrained(QUICKSTART),
        data_collator=dpo_trainer.DataCollatorForPreference(pad_token_id=0),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    )  # fmt: skip


def sft_columns(row: Row) -> Row:
    prompt, response = row["prompt_token_ids"], row["chosen_token_ids"]
    return {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}


def reward_model_columns(row: Row) -> Row:
    return {f"{side}_ids": row["prompt_token_ids"] + row[f"{side}_token_ids"] for side in ("chosen", "rejected")}


def dpo_columns(row: Row) -> Row:
    token_ids = {f"{part}_ids": row[f"{part}_token_ids"] for part in ("prompt", "chosen", "rejected")}
    return token_ids | {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}


TRAINERS: dict[str, Callable[[str, dict[str, Any], bool], Any]] = {"sft": sft, "reward_model": reward_model, "dpo": dpo}
COLUMNS: dict[str, Callable[[Row], Row]] = {
    "sft": sft_columns,
    "reward_model": reward_model_columns,
    "dpo": dpo_columns,
}
