"""TRL's side of the DPO benchmark: its trainer on given tokens, timed by optimizer step."""

import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl.trainer.dpo_config import DPOConfig as TrlConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from rayrl.models.policy import load_policy
from rayrl.records import Checkpoint

QUICKSTART = "jobs/quickstart/model"
Round = tuple[float, int, int]
"""Seconds, tokens without padding, tokens with it."""


class Counting(DataCollatorForPreference):
    """TRL's collator, which also keeps the size of every micro-batch."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        SIZES.append((int(batch["attention_mask"].sum()), batch["attention_mask"].numel()))
        return batch


SIZES: list[tuple[int, int]] = []


class Clock(TrainerCallback):
    """Callback that keeps the time at which each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


class Theirs:
    """TRL's trainer on the same tokens, given in the columns its own preparation makes."""

    def __init__(self, path: str, pairs: list[Any], batch_size: int, micro_batch: int, *, use_cpu: bool = True):
        self.accumulation = batch_size // micro_batch
        arguments = TrlConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=micro_batch, num_train_epochs=1,
            gradient_accumulation_steps=self.accumulation, gradient_checkpointing=False, bf16=False, use_cpu=use_cpu,
            lr_scheduler_type="constant", precompute_ref_log_probs=True, report_to=[], save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False, max_length=None, logging_steps=10_000,
            learning_rate=1e-5,
        )  # fmt: skip
        self.clock = Clock()
        tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
        self.trainer = DPOTrainer(
            model=load_policy(Checkpoint(path=path, version=path), torch.float32),
            args=arguments, processing_class=tokenizer, callbacks=[self.clock],
            data_collator=Counting(pad_token_id=0),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        )  # fmt: skip
        self.trainer.remove_callback(PrinterCallback)
        columns = {
            "prompt_token_ids": "prompt_ids",
            "chosen_token_ids": "chosen_ids",
            "rejected_token_ids": "rejected_ids",
        }
        rows = [{theirs: pair[ours] for ours, theirs in columns.items()} for pair in pairs]
        self.trainer.train_dataset = Dataset.from_list(
            [row | {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} for row in rows]
        )

    def round(self) -> Round:
        SIZES.clear()
        self.clock.ends.clear()
        self.trainer.train()
        later = SIZES[self.accumulation :]
        return self.clock.ends[-1] - self.clock.ends[0], sum(n for n, _ in later), sum(n for _, n in later)
