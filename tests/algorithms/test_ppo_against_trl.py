"""Our token losses against TRL's GRPO trainer, which shares PPO's clipped objective, with a tiny random Llama."""

import warnings

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rayrl.algorithms.ppo import kl_penalty, policy_loss, truncated_importance
from rayrl.algorithms.preference import token_logprobs

with warnings.catch_warnings():
    # TRL warns of a vLLM that it has not been tried with (nothing here uses it), and torch's own modules, which it
    # imports, of deprecated parts of torch.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM", category=UserWarning)
    warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
    from trl import GRPOConfig, GRPOTrainer


PROMPT, RESPONSE = 3, 8


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
    )
    settings = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("grpo")),
        loss_type="bnpo",
        epsilon=0.2,
        use_bias_correction_kl=False,  # GRPO's KL is in the loss, ours in the rewards
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=4,
        num_generations=4,
    )
    return GRPOTrainer(
        model=LlamaForCausalLM(config),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("off_policy", [False, True])
def test_policy_loss_and_k3_are_trls(trainer, off_policy):
    ids = torch.randint(3, 17, (4, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(RESPONSE) < torch.tensor([8, 1, 5, 3])[:, None]).int()
    attention = torch.cat([torch.ones(4, PROMPT).int(), mask], 1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=attention).logits
    logprobs = token_logprobs(logits[:, PROMPT - 1 : -1], ids[:, PROMPT:])
    noise = torch.randn(4, 4, RESPONSE, generator=torch.Generator().manual_seed(1))
    old, reference, sampler, advantages = *(logprobs + 0.3 * noise[:3]), noise[3]
    importance = truncated_importance(old, sampler, 1.2)
    inputs = {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": attention[:, :PROMPT],
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "importance_sampling_ratio": importance,
        "num_items_in_batch": mask.sum(),
    }
    trainer.beta = 0.3  # only here: from the start it would make the trainer load a reference model from the hub
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = off_policy
    trainer.current_gradient_accumulation_steps = 1
    expected = trainer._compute_loss(trainer.model, inputs).item()

    losses = policy_loss(logprobs, old, advantages, clip_range=0.2, importance=importance if off_policy else None)
    losses = (losses + 0.3 * kl_penalty(logprobs, reference, "k3"))[mask.bool()]
    assert losses.std() > 0.01
    assert losses.mean().item() == pytest.approx(expected, abs=1e-5)
