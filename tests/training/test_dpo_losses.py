"""DPO's loss of a padded batch of pairs, against the same computed pair by pair from the policy's log-probabilities."""

import math

import pytest
import torch
from pydantic import ValidationError

from rayrl.algorithms import preference
from rayrl.config import DpoConfig
from rayrl.data.collate import collate
from rayrl.models.policy import TokenLogprobs, response_token_logprobs
from rayrl.training.dpo import pair_batch, pair_losses

PAIRS = [([5, 6, 7], [8, 9, 10, 11], [12, 13]), ([4], [9], [10, 12, 14, 5, 6])]
REFERENCES = [(-9.0, -5.5), (-2.0, -14.0)]


@pytest.fixture(scope="module")
def model(tiny_policy):
    return tiny_policy.load()


def rows(references=REFERENCES):
    return [
        {
            "chosen_id": f"c{place}",
            "rejected_id": f"r{place}",
            "prompt_token_ids": prompt,
            "chosen_token_ids": chosen,
            "rejected_token_ids": rejected,
            "chosen_reference_logprob": reference[0],
            "rejected_reference_logprob": reference[1],
        }
        for place, ((prompt, chosen, rejected), reference) in enumerate(zip(PAIRS, references, strict=True))
    ]


def alone(model, prompt, response):
    return response_token_logprobs(model, collate([prompt], [response]))[0]


def on_policy_weight(model, prompt, *responses):
    exponent = 0.0
    for response in responses:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        probabilities = logits.softmax(-1)
        own = probabilities.gather(-1, torch.tensor(response)[:, None])[:, 0]
        exponent += (own.log() - probabilities.square().sum(-1).log()).mean().item()
    return min(1.0, math.exp(exponent))


def by_hand(model, dpo):
    losses = []
    for (prompt, chosen, rejected), references in zip(PAIRS, REFERENCES, strict=True):
        shorter = min(len(chosen), len(rejected))
        sums, means = [], []
        for response, reference in zip((chosen, rejected), references, strict=True):
            logprobs = alone(model, prompt, response)
            log_ratio = logprobs[:shorter].sum() + dpo.ld_alpha * logprobs[shorter:].sum()
            log_ratio = log_ratio - (0 if dpo.reference == "none" else reference)
            sums.append(log_ratio / (len(response) if dpo.length_normalised else 1))
            means.append(logprobs.mean())
        difference = (sums[0] - sums[1] - dpo.margin / dpo.beta).unsqueeze(0)
        loss = preference.PREFERENCE_LOSSES[dpo.loss](difference, beta=dpo.beta, label_smoothing=dpo.label_smoothing)
        weight = on_policy_weight(model, prompt, chosen, rejected) if dpo.weighting == "on_policy" else 1.0
        losses.append(weight * loss.item() - dpo.nll_coef * means[0].item())
    return losses


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "robust", "label_smoothing": 0.2},
        {"loss": "ipo"},
        {"loss": "ipo", "length_normalised": True},
        {"nll_coef": 0.5},
        {"ld_alpha": 0.3},
        {"weighting": "on_policy"},
        {"reference": "none", "length_normalised": True, "margin": 0.5, "beta": 2.0},
    ],
    ids=["dpo", "robust", "ipo", "normalised ipo", "rpo", "ld-dpo", "wpo", "simpo"],
)
def test_the_loss_of_a_batch_is_that_of_its_pairs(model, settings):
    dpo = DpoConfig(**settings)
    batch = pair_batch(rows())
    with torch.no_grad():
        losses, chosen_rewards, rejected_rewards = pair_losses(TokenLogprobs(model), batch, dpo)
        assert losses.tolist() == pytest.approx(by_hand(model, dpo), rel=1e-5, abs=1e-5)
    assert chosen_rewards.shape == rejected_rewards.shape == (2,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, 'dpo.label_smoothing must be 0 with dpo.loss = "ipo"'),
        ({"ld_alpha": 0.5, "reference": "generation"}, 'dpo.reference must be "auto", "pass" or "none"'),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        DpoConfig(**settings)
