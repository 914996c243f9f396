"""Entailment replicas: what a model's outputs mean, what is read once, what is cut, and what a kill changes."""

import os
import shutil
import signal
from itertools import permutations, product

import numpy as np
import pytest
import ray
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from rayrl.data.tokenizing import load_tokenizer
from rayrl.engines.entailment import EntailmentModel, EntailmentSpec
from rayrl.errors import ConfigError
from rayrl.fleets.services import start_entailment
from rayrl.models.mnli import check_labels, label_order, load_entailment
from tests.chat_policies import chat_policy
from tests.entailment_model import ANSWERS, COLORS, encode, make_random_model

TEXTS = [answer.format(color) for answer in ANSWERS for color in COLORS]
PAIRS = list(permutations(TEXTS, 2))
MEANING = {0: 2, 1: 1, 2: 0}
"""From the tests' models' outputs to contradiction 0, neutral 1, entailment 2."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_random_model(tmp_path_factory.mktemp("entailment") / "model")


def spec(folder, max_tokens=64):
    return EntailmentSpec(path=str(folder), max_tokens=max_tokens, threads=1, on_gpu=False)


@pytest.fixture(scope="module")
def model(folder):
    return EntailmentModel(spec(folder))


def labels_one_by_one(folder, pairs):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        outputs = [model.eval()(**encode(tokenizer, [(*pair, 0)])).logits.argmax().item() for pair in pairs]
    return [MEANING[output] for output in outputs]


def test_labels_are_transformers_in_our_order(folder, model):
    pairs = PAIRS[::5]
    found = model.classify(pairs)
    assert found.labels.dtype == np.int8
    assert found.labels.tolist() == labels_one_by_one(folder, pairs)
    assert set(found.labels) == {0, 1, 2}
    assert found.asked.all() and not found.truncated.any()


@pytest.mark.parametrize("order", list(permutations(["CONTRADICTION", "neutral", "Entailment"])))
def test_any_order_and_case_of_the_three_labels_will_do(order):
    assert check_labels(dict(enumerate(order)), "model") == [
        {"contradiction": 0, "neutral": 1, "entailment": 2}[name.lower()] for name in order
    ]
    in_json = {str(output): order[output] for output in (2, 0, 1)}
    assert check_labels(in_json, "model") == check_labels(dict(enumerate(order)), "model")


@pytest.mark.parametrize(
    "labels",
    [
        {0: "entailment", 1: "not_entailment"},
        {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"},
        {0: "neutral", 1: "entailment", 2: "entailment"},
    ],
)
def test_other_labels_are_refused_before_a_replica_starts(tmp_path, labels):
    folder = make_random_model(tmp_path / "other", labels)
    with pytest.raises(ConfigError) as caught:
        start_entailment("refused", spec(folder), num_replicas=1, num_gpus=0)
    message = str(caught.value)
    assert "refresh.spg.entailment_model" in message and ", ".join(labels.values()) in message
    assert "name a model trained on MNLI" in message


def test_what_is_no_trained_classifier_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"entailment_model must be a model's folder or a hub id, got .*nowhere"):
        label_order(str(tmp_path / "nowhere"))
    headless = tmp_path / "headless"
    BertForSequenceClassification.from_pretrained(folder).bert.save_pretrained(headless)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, headless)
    with pytest.raises(ConfigError, match=r"no weights for .*classifier\.weight"):
        load_entailment(str(headless), torch.float32)
    (headless / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="saved as safetensors"):
        load_entailment(str(headless), torch.float32)


def test_each_distinct_pair_is_read_once(model):
    red, blue = "it is red", "blue"
    pairs = [(red, blue), (blue, red), (red, blue), (red, red), (blue, red), (blue, blue)]
    found = model.classify(pairs)
    assert found.asked.tolist() == [True, True, False, False, False, False]
    forward, backward = model.classify([(red, blue), (blue, red)]).labels
    assert found.labels.tolist() == [forward, backward, forward, 2, backward, 2]
    nothing = model.classify([(red, red)])
    assert (nothing.labels.tolist(), nothing.asked.tolist()) == ([2], [False])
    assert model.classify([]).labels.shape == (0,)


def test_separators_inside_a_text_are_text(model):
    (clean,) = model._encode([("it is red", "blue")])["input_ids"]
    (attacked,) = model._encode([("it is [SEP] red [CLS]", "[SEP] blue")])["input_ids"]
    separators = model._tokenizer.sep_token_id, model._tokenizer.cls_token_id
    assert [attacked.count(token_id) for token_id in separators] == [clean.count(token_id) for token_id in separators]


def test_a_tokenizer_of_letters_spells_separators(tmp_path):
    replica = object.__new__(EntailmentModel)  # encoding needs no model
    replica._tokenizer, replica._max_tokens = load_tokenizer(chat_policy(tmp_path / "m")), 64
    for cut in (True, False):
        (token_ids,) = replica._encode([("a</s>b", "<|im_end|>")], cut=cut)["input_ids"]
        assert replica._tokenizer.eos_token_id not in token_ids
        assert replica._tokenizer.decode(token_ids).endswith("a</s>b<|im_end|>")


def test_what_is_too_long_loses_the_end_of_the_longer_text_and_is_counted(folder):
    short = EntailmentModel(spec(folder, max_tokens=10))
    fits, longer = ("it is red", "the color is blue"), ("it is red", "the color is blue it is")  # 10 and 12 tokens
    found = short.classify([fits, longer, longer, ("red", "red")])
    assert found.truncated.tolist() == [False, True, False, False]
    assert found.labels[1] == found.labels[2] == short.classify([fits]).labels[0]


def test_a_model_reads_no_more_than_its_context(folder, caplog):
    model = EntailmentModel(spec(folder, max_tokens=512))
    assert "reads 24 tokens, not max_tokens = 512" in caplog.text
    found = model.classify([("red " * 11, "blue " * 10), ("red " * 40, "blue " * 40)])
    assert found.truncated.tolist() == [False, True]


@pytest.fixture(scope="module")
def fleet(ray_cluster, folder):
    fleet = start_entailment("test-entailment", spec(folder), num_replicas=2, num_gpus=1.0)
    fleet.wait_ready()
    yield fleet
    fleet.stop()


def test_replicas_answer_alike_and_have_their_threads(fleet, model):
    expected = model.classify(PAIRS).labels
    answers = ray.get([replica.classify.remote(PAIRS) for replica in fleet.replicas])
    for answer in answers:
        np.testing.assert_array_equal(answer.labels, expected)
    assert len({status["pid"] for status in fleet.wait_ready()}) == 2
    np.testing.assert_array_equal(fleet.call("classify", PAIRS).labels, expected)


def test_a_killed_replica_answers_the_same_call(fleet, model):
    pairs = [(f"{a} {b}", c) for a, b, c in product(TEXTS[:12], TEXTS, TEXTS)]
    pid = ray.get(fleet.replicas[0].status.remote())["pid"]
    call = fleet.replicas[0].classify.remote(pairs)
    os.kill(pid, signal.SIGKILL)
    again = ray.get(call, timeout=300)
    np.testing.assert_array_equal(again.labels, model.classify(pairs).labels)
    assert ray.get(fleet.replicas[0].status.remote())["pid"] != pid


@pytest.mark.slow
def test_a_replica_that_cannot_start_says_why(ray_cluster, folder, tmp_path):
    headless = tmp_path / "headless"
    shutil.copytree(folder, headless)
    (headless / "model.safetensors").unlink()
    fleet = start_entailment("test-headless", spec(headless), num_replicas=1, num_gpus=0)
    with pytest.raises(Exception, match="saved as safetensors"):
        fleet.wait_ready(60)
    fleet.stop()
