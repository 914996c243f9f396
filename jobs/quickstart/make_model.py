"""Make the quickstart's model and data from nothing: about a minute on one CPU core, the same bytes every time.

    python -m jobs.quickstart.make_model [folder]

Writes `model/` (a tiny Llama and its tokenizer), `seed.jsonl` (prompts with responses) and `prompts.jsonl` (the pool).
The pool's prompts are in neither the pretraining text nor the seed. The head size is 32: vLLM's CPU attention takes no
smaller one.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jobs.quickstart.corpus import all_prompts, answer, plain_text

NUM_POOL, NUM_SEED = 1100, 400
NUM_ANSWERS, NUM_PLAIN = 16_000, 8_000
VOCAB_SIZE, CONTEXT = 768, 512
PAD, BOS, EOS = 0, 1, 2
BATCH_SIZE, LEARNING_RATE = 16, 3e-3


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE (any text can be encoded) that puts <s> in front, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>"]  # in the order of their ids
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About 0.7 million random parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,  # at the usual 0.02 it does not learn in time to copy the thing asked about
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def batches(rows: list[list[int]], rng: random.Random) -> Iterator[torch.Tensor]:
    """Right-padded batches (B, T) of rows of like length, in random order."""
    rng.shuffle(rows)
    rows.sort(key=len)
    starts = list(range(0, len(rows), BATCH_SIZE))
    rng.shuffle(starts)
    for start in starts:
        group = rows[start : start + BATCH_SIZE]
        width = max(map(len, group))
        yield torch.tensor([row + [PAD] * (width - len(row)) for row in group])


def pretrain(model: LlamaForCausalLM, rows: list[list[int]], rng: random.Random) -> float:
    """One pass over the rows; returns the mean loss of the last fifty steps, nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    num_steps = -(-len(rows) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, num_steps, pct_start=0.1)
    losses = []
    for ids in batches(rows, rng):
        mask = ids.ne(PAD)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~mask, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-50:]) / len(losses[-50:])


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(folder: Path) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the order of float additions, and so the bytes, depends on it
    questions = all_prompts()
    rng.shuffle(questions)
    pool, seed, rest = questions[:NUM_POOL], questions[NUM_POOL:][:NUM_SEED], questions[NUM_POOL + NUM_SEED :]
    seed_rows = [{"prompt": q[3], "response": answer(*q[:3], rng)} for q in seed]
    asked = [rng.choice(rest) for _ in range(NUM_ANSWERS)]
    answered = [(q[3], answer(*q[:3], rng)) for q in asked]
    plain = [plain_text(rng) for _ in range(NUM_PLAIN)]

    tokenizer = train_tokenizer([text for pair in answered for text in pair] + plain)
    rows = [[*tokenizer(text).input_ids, EOS] for text in plain]
    for index, (prompt, response) in enumerate(answered):
        if index % 8:  # most as the policy will be asked, some in the form that a judge reads
            rows.append(tokenizer(prompt).input_ids + tokenizer(response, add_special_tokens=False).input_ids + [EOS])
        else:
            rows.append([*tokenizer(f"Question: {prompt}\nAnswer: {response}\n").input_ids, EOS])
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {sum(map(len, rows)):,} tokens")
    print(f"loss {pretrain(model, rows, rng):.3f}")

    model.generation_config.update(do_sample=True, temperature=0.9)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_rows(folder / "seed.jsonl", seed_rows)
    write_rows(folder / "prompts.jsonl", [{"prompt": q[3]} for q in pool])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
