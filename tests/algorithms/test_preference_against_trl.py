"""Our losses on TRL's own batch against the loss its trainers compute, with a tiny random Llama."""

import warnings

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rayrl.algorithms.preference import bradley_terry_loss, dpo_loss, token_logprobs

with warnings.catch_warnings():
    # TRL warns of a vLLM that it has not been tried with (nothing here uses it), and torch's own modules, which it
    # imports, of deprecated parts of torch.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM", category=UserWarning)
    warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer


WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "slept", "happily"]
ROWS = [
    {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran"},
    {"prompt": "a dog ran", "chosen": " under a tree and then slept", "rejected": " the the mat"},
    {"prompt": "then", "chosen": " the dog slept happily", "rejected": " a a cat sat under under the"},
]


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def llama(tokenizer, kind, seed, **settings):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.5,  # far from uniform, so that the losses differ from log 2
        **settings,
    )
    return kind(config)


@pytest.fixture(scope="module")
def dpo_trainer(tokenizer, tmp_path_factory):
    settings = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("dpo")),
        beta=0.3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=len(ROWS),
    )
    policy, reference = (llama(tokenizer, LlamaForCausalLM, seed) for seed in (0, 1))
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("sigmoid", {}),
        ("robust", {"loss": "robust", "label_smoothing": 0.2}),
        ("ipo", {"loss": "ipo"}),
        ("sigmoid_norm", {}),
    ],
)
def test_dpo_loss_is_trls(dpo_trainer, theirs, ours):
    dpo_trainer.loss_types = [theirs]
    dpo_trainer.label_smoothing = ours.get("label_smoothing", 0.0)
    batch = next(iter(dpo_trainer.get_train_dataloader()))
    expected = dpo_trainer.compute_loss(dpo_trainer.model, dict(batch))

    mask = batch["completion_mask"][:, 1:]
    with torch.no_grad():
        sides = [
            torch.where(
                mask.bool(),
                token_logprobs(
                    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1],
                    batch["input_ids"][:, 1:],
                ),
                0.0,
            )
            .sum(-1)
            .chunk(2)
            for model in (dpo_trainer.model, dpo_trainer.ref_model)
        ]
    if theirs in ("ipo", "sigmoid_norm"):
        ours = ours | {"lengths": mask.sum(1).chunk(2)}
    chosen, rejected = (policy - reference for policy, reference in zip(*sides, strict=True))
    losses, *_ = dpo_loss(chosen, rejected, beta=0.3, **ours)
    assert losses.std() > 0.01
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-5)


def test_bradley_terry_loss_is_trls(tokenizer, tmp_path):
    settings = RewardConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=len(ROWS),
    )
    trainer = RewardTrainer(
        model=llama(tokenizer, LlamaForSequenceClassification, 2, num_labels=1),
        args=settings,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, dict(batch))
    with torch.no_grad():
        rewards = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = bradley_terry_loss(*rewards.squeeze(-1).chunk(2))
    assert losses.std() > 0.01
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-5)
