"""Sections of the report's page: which numbers of a run a reader sees, in which order, and under which names.

A section or a row is there if the run has its stage; a number whose stage has not finished is "not run", one that was
not measured is a dash.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

from rayrl.algorithms.estimate import Estimate
from rayrl.report.caveats import effect_of_no_pairs
from rayrl.report.facts import PaidQueries, PolicyFacts, RewardModelFacts, RunFacts
from rayrl.report.figures import training_stages
from rayrl.report.formats import NOT_RUN, duration, number, plus_minus
from rayrl.report.label_meter import advice, meter_rows
from rayrl.report.layout import (
    Card,
    FigureCard,
    Grid,
    Notice,
    Paragraph,
    Remark,
    Section,
    Table,
    Tile,
    estimate_of,
    estimate_tile,
    number_of,
)
from rayrl.report.policies import ppo_titles
from rayrl.report.recorded_run import RecordedRun
from rayrl.report.settings import label_queries
from rayrl.runs.stage_metrics import M1, PpoMetrics, ReferencesEvaluation, RewardEvaluation, StageMetrics
from rayrl.runs.stage_table import (
    AUDIT_PAIRS,
    DPO,
    EVALUATE,
    FIT_EVALUATOR,
    FIT_REWARD_MODEL,
    GENERATE,
    IMPORTANCE,
    POOL,
    PPO,
    PPO_REFRESHED,
    PREFERENCES,
    PSEUDO_LABEL,
    QUERY,
    REFIT_REWARD_MODEL,
    SAMPLES,
    SELECT,
    SFT,
    SYNTHESIZE,
    TRACK_REWARDS,
    Stage,
    fits_evaluator,
)

M = TypeVar("M", bound=StageMetrics)

INDENT = "\u00a0\u00a0"
PAPERS = {
    "proxy_dpo": "Proxy-reward alignment: arXiv 2407.02119.",
    "rlp": "Reward learning on policy: arXiv 2403.19279.",
}


def tiles(facts: RunFacts) -> list[Tile]:
    """Make the headline numbers."""
    name = facts.aligned_title
    aligned = facts.policy(facts.aligned)
    evaluation = None if aligned is None else aligned.evaluation
    win_rate = None if evaluation is None else evaluation.win_rate
    controlled = None if evaluation is None else evaluation.length_controlled_win_rate
    found = [estimate_tile(facts.gain, f"gain in mean oracle score, {name} minus M1", signed=True)]
    if facts.run.config.learns_from_comparisons:
        found.append(estimate_tile(facts.gain_over_ppo, f"gain of {name} over plain PPO", signed=True))
    found.append(estimate_tile(win_rate, f"win rate of {name} against M1", no_change=0.5, percent=True))
    found.append(estimate_tile(controlled, "win rate, length-controlled", no_change=0.5, percent=True))
    found.append(_paid_tile(facts.paid.label, label_queries(facts.run.config)))
    found.append(_paid_tile(facts.paid.evaluate, "evaluation queries"))
    if facts.run.has(PSEUDO_LABEL):
        ratio = facts.paid.pairs_per_query
        state = "none" if ratio is None else ""
        found.append(Tile(value=number(ratio, ",.1f"), title="preference pairs per paid query", state=state))
    return found


def _paid_tile(paid: PaidQueries, queries: str) -> Tile:
    value = f"{number(paid.spent)} / {number(paid.budget)}"
    return Tile(value=value, title=f"paid {queries} of the budget", state="none" if paid.spent is None else "")


def sections(facts: RunFacts) -> list[Section]:
    """Make all sections between the headline numbers and the sample answers, in order."""
    makers: list[Callable[[RunFacts], Section | None]] = [
        _policies,
        _paid,
        _people,
        _rounds,
        _selection,
        _evaluator,
        _reward_models,
        _label_meter,
        _agreement,
        _ppo,
        _tracked_rewards,
        _synthetic_pairs,
        _compute,
        _training,
    ]
    made = [make(facts) for make in makers]
    return [section for section in made if section is not None]


def _policies(facts: RunFacts) -> Section:
    evaluated = facts.run.last(EVALUATE)
    references = None if evaluated is None else evaluated.references
    head = ["held-out prompts", "oracle score", "gain over M1", "win rate", "length-controlled"]
    if references is not None:
        head.append("against references")
    head += ["KL, nats", "perplexity", "distinct-2", "self-BLEU", "tokens"]
    if evaluated is None:
        rows = [[policy.title, *[NOT_RUN] * (len(head) - 1)] for policy in facts.policies]
    else:
        rows = [list(_policy_row(policy, has_references=references is not None)) for policy in facts.policies]
    notes: list[str] = []
    if facts.run.config.learns_from_comparisons:
        notes.append(f"{facts.aligned_title} over plain PPO: {plus_minus(facts.gain_over_ppo, signed=True)}.")
    if evaluated is not None:
        notes.append(f"{number(evaluated.num_judged)} prompts judged per policy.")
    notes.append("Win rates compare the oracle's scores of single answers.")
    if references is not None:
        notes.append(_reference_verdicts(references))
    sampling = facts.run.config.generate
    top_k = f" and top_k {sampling.top_k}" if sampling.top_k else ""
    notes.append(
        f"Answers are sampled at temperature {facts.run.config.evaluate.temperature:g} and top_p {sampling.top_p:g}"
        f"{top_k}. KL is to M1, per response, of the policy itself, on samples of its own at temperature 1 and "
        "top_p 1; perplexity is under M1; distinct-2 is higher and self-BLEU lower where answers are more diverse."
    )
    # Without a budget no answer is judged, and the figure has nothing to show.
    scores = FigureCard(name="scores", title="Oracle scores by policy", is_final=evaluated is not None)
    return Section(
        title="The policies",
        parts=[
            Table(head=head, rows=rows, has_wide_names=True),
            Paragraph(text=" ".join(notes)),
            Grid(cards=[scores, *_benchmarks(facts)]),
        ],
    )


def _policy_row(policy: PolicyFacts, *, has_references: bool) -> Iterator[str]:
    found = policy.evaluation
    assert found is not None, "the evaluation has all policies of the table"
    yield policy.title
    yield plus_minus(found.score)
    if policy.name == M1:
        yield from ("-", "-", "-")
    else:
        yield plus_minus(found.difference, signed=True)
        yield plus_minus(found.win_rate, percent=True)
        yield plus_minus(found.length_controlled_win_rate, percent=True)
    if has_references:
        yield plus_minus(None if policy.reference is None else policy.reference.win_rate, percent=True)
    if found.kl is not None and found.kl_is_bound:
        # A bound is computed, not measured: it has no standard error.
        yield f"at most {found.kl.mean:.2f}"
    else:
        yield plus_minus(found.kl)
    yield number(found.perplexity, ",.2f", missing="-")
    yield number(found.distinct2, ".3f")
    yield number(found.self_bleu, ".3f")
    yield number(found.length, ",.1f")


def _reference_verdicts(references: ReferencesEvaluation) -> str:
    """Say what a win rate against the references compares, and how much of it is missing."""
    if references.by == "scores":
        compared = "compare scores: this oracle compares no answers itself"
    else:
        orders = "both orders, a disagreement being a tie" if references.by == "both" else "one drawn order"
        compared = f"are the oracle's verdicts on an answer and the reference side by side, asked about in {orders}"
    num_abstained = sum(policy.num_abstained for policy in references.policies.values())
    num = references.num_prompts * len(references.policies)
    return (
        f"Win rates against the references {compared}; it abstained on {number(num_abstained)} of {number(num)}, "
        "which are left out."
    )


def _benchmarks(facts: RunFacts) -> Iterator[Table]:
    """Results of lm-evaluation-harness, a column per policy."""
    evaluated = facts.run.last(EVALUATE)
    if evaluated is None or not evaluated.lm_eval:
        return
    names = list(evaluated.lm_eval)
    values: dict[tuple[str, str], dict[str, float]] = {}
    for name, results in evaluated.lm_eval.items():
        for task, measured in results.items():
            for metric, value in measured.items():
                values.setdefault((task, metric), {})[name] = value
    rows: list[list[str]] = []
    for (task, metric), by_policy in values.items():
        cells = [number(by_policy.get(name), ".4g", missing="-") for name in names]
        rows.append([task, metric, *cells])
    titles = {policy.name: policy.title for policy in facts.policies}
    head = ["benchmark", "metric", *(titles.get(name, name) for name in names)]
    yield Table(head=head, rows=rows, num_text_columns=2)


def _paid(facts: RunFacts) -> Section:
    bought = Table(head=["what it bought", ""], rows=list(_bought(facts)))
    return Section(title="What was paid, and what it bought", parts=[Grid(cards=[_paid_queries(facts), bought])])


def _paid_queries(facts: RunFacts) -> Table:
    labels = "preferences" if facts.run.config.learns_from_comparisons else "labels"
    measures: list[tuple[str, Callable[[PaidQueries], int | None]]] = [
        ("budget", lambda paid: paid.budget),
        ("spent", lambda paid: paid.spent),
        ("scored", lambda paid: paid.scored),
        ("abstained (no label)", lambda paid: paid.abstained),
        ("lost (crash, failed judge)", lambda paid: paid.lost),
        ("failed and not charged", lambda paid: paid.refunded),
        ("in flight", lambda paid: paid.in_flight),
        ("answered from the ledger, free", lambda paid: paid.taken_over),
        ("tokens read", lambda paid: paid.input_tokens),
        ("tokens written", lambda paid: paid.output_tokens),
    ]
    purposes = {labels: facts.paid.label, "evaluation": facts.paid.evaluate}
    if facts.paid.test.spent:
        purposes["test"] = facts.paid.test
    if facts.paid.people.budget:
        purposes["people"] = facts.paid.people
    rows: list[list[str]] = []
    for name, measure in measures:
        rows.append([name, *(number(measure(paid), missing="-") for paid in purposes.values())])
    rows.append(["cost, USD", *(number(paid.cost_usd, ",.2f", missing="unpriced") for paid in purposes.values())])
    for reason in dict.fromkeys(reason for paid in purposes.values() for reason in paid.abstentions):
        nums = (paid.abstentions.get(reason, 0) for paid in purposes.values())
        rows.append([f"{INDENT}abstained: {reason}", *map(str, nums)])
    return Table(head=["paid queries", *purposes], rows=rows)


def _people(facts: RunFacts) -> Section | None:
    """Show who answered how much, how people agree, and how judges agree with them."""
    people = facts.people
    if people is None:
        return None
    rows = [
        [each.name, str(each.num_answers), str(each.num_cannot_say), duration(each.median_s, missing="-")]
        for each in people.people
    ]
    shares = Table(head=["person", "answers", "cannot say", "median time for one"], rows=rows, has_wide_names=True)
    agreement = [
        ["questions that people answered", number(people.num_questions)],
        ["of those by two or more", number(people.num_shared)],
        ["Krippendorff's alpha of scores", number(people.alpha_scores, ".3f", missing="-")],
        ["Krippendorff's alpha of preferences", number(people.alpha_preferences, ".3f", missing="-")],
    ]
    if people.num_beside_judges:
        agreement += [
            ["questions that judges answered too", number(people.num_beside_judges)],
            ["judges' score less people's, mean", number(people.mean_difference, "+.2f", missing="-")],
            ["distance of the two scores, mean", number(people.mean_distance, ".2f", missing="-")],
            ["Cohen's kappa of the preferences", number(people.kappa, ".3f", missing="-")],
        ]
    notes = "Alpha and kappa are 1 where all agree, and 0 where they agree as often as by chance."
    if people.num_beside_judges:
        notes += " People were asked where judges differ or abstain: elsewhere these agree with them better."
    cards = Grid(cards=[shares, Table(head=["agreement", ""], rows=agreement)])
    return Section(title="What people said", parts=[cards, Paragraph(text=notes)])


def _bought(facts: RunFacts) -> Iterator[list[str]]:
    run, paid = facts.run, facts.paid
    pool, generated = run.metrics(POOL), run.last(GENERATE)
    yield ["prompts in the pool", number_of(pool, lambda found: found.num_prompts)]
    yield ["held-out prompts", number_of(pool, lambda found: found.num_eval)]
    if run.has(GENERATE):
        source = "from M1" if run.config.rounds == 1 else "in the last round"
        yield [f"responses sampled {source}", number_of(generated, lambda found: found.num_responses)]
        num_empty = number_of(generated, lambda found: found.num_empty)
        num_repeated = number_of(generated, lambda found: found.num_duplicates)
        yield [f"{INDENT}empty / duplicate", f"{num_empty} / {num_repeated}"]
    if run.has(PSEUDO_LABEL):
        labelled = "pseudo-labelled by the evaluator" if fits_evaluator(run.config) else "with a score of the oracle"
        yield [f"responses {labelled}", number(paid.num_scored)]
        scored = run.last(PSEUDO_LABEL)
        if scored is not None and scored.num_too_long:
            yield [f"{INDENT}too long for the evaluator's context", number(scored.num_too_long)]
    if run.has(PSEUDO_LABEL) or run.has(PREFERENCES):
        yield ["preference pairs", number(paid.num_pairs)]
    if run.has(PSEUDO_LABEL):
        if run.has(SYNTHESIZE):
            rate = number_of(run.last(SYNTHESIZE), lambda found: found.acceptance_rate, ".1%")
            yield [f"{INDENT}synthetic (prompts accepted: {rate})", number(paid.num_synthetic)]
        yield ["ties dropped", number(paid.num_ties)]
        yield ["pairs per paid query", number(paid.pairs_per_query, ",.1f")]


def _rounds(facts: RunFacts) -> Section | None:
    run = facts.run
    if run.config.rounds == 1:
        return None
    columns = list(_round_columns(run))
    rows: list[list[str]] = []
    for round_ in run.rounds():
        rows.append([str(round_), *(show(round_) for _, show in columns)])
    table = Table(head=["round", *(name for name, _ in columns)], rows=rows)
    if run.has(DPO):
        starts = (
            "M2 is the policy after the last round; each round's DPO starts from the policy of the one before, with it "
            "as the reference."
        )
    else:
        rewards = "reward model" if run.config.learns_from_comparisons else "reward's fit"
        starts = f"Every {rewards} and every PPO starts at M1."
    note = (
        "Queries and pairs in the sections above and below are of all rounds, everything else about a stage is of the "
        f"last round that finished it. {starts}"
    )
    return Section(title="Rounds", parts=[table, Paragraph(text=note)])


def _round_columns(run: RecordedRun) -> Iterator[tuple[str, Callable[[int], str]]]:
    """Yield the columns of the table of rounds: a title, and what a round's cell shows."""

    def queries(round_: int) -> str:
        # A round has one of them: it judges responses, or it compares them.
        judged, compared = run.metrics(QUERY, round_), run.metrics(PREFERENCES, round_)
        if judged is not None:
            return number(judged.num_spent)
        if compared is not None:
            return number(0 if compared.asked is None else compared.asked.num_spent)  # a file of pairs costs nothing
        return "-"

    def column(stage: Stage[M], show: Callable[[M], str]) -> Callable[[int], str]:
        def show_round(round_: int) -> str:
            metrics = run.metrics(stage, round_)
            return "-" if metrics is None else show(metrics)

        return show_round

    yield "paid label queries", queries
    if run.has(FIT_EVALUATOR):
        correlation = column(FIT_EVALUATOR, lambda metrics: plus_minus(metrics.validation.spearman))
        yield "evaluator's rank correlation", correlation
    if run.has(PREFERENCES):
        yield "preference pairs so far", column(PREFERENCES, lambda metrics: number(metrics.num_pairs))
        for name, stage in (("accuracy of r", FIT_REWARD_MODEL), ("refreshed", REFIT_REWARD_MODEL)):
            if run.has(stage):
                yield name, column(stage, lambda metrics: plus_minus(metrics.validation.accuracy))
        if run.has(SYNTHESIZE):
            yield "synthetic pairs", column(SYNTHESIZE, lambda metrics: number(metrics.num_pairs))
    for name, stage in (("reward of PPO", PPO), ("on the refreshed reward", PPO_REFRESHED)):
        if run.has(stage):
            yield name, column(stage, lambda metrics: number(metrics.final_reward, ".3f"))
    if run.has(PSEUDO_LABEL):
        yield "preference pairs", column(PSEUDO_LABEL, lambda metrics: number(metrics.num_pairs))
        yield "of them synthetic", column(PSEUDO_LABEL, lambda metrics: number(metrics.num_synthetic))
        yield "DPO reward accuracy", column(DPO, lambda metrics: number(metrics.reward_accuracy, ".2f"))


def _selection(facts: RunFacts) -> Section | None:
    run = facts.run
    if not run.has(SELECT):
        return None
    selection = run.last(SELECT)
    # A budget for everything picks nothing, so that a finished selection may leave no figure.
    is_final = selection is not None or not run.config.embeds_pool
    cards: list[Card] = [
        FigureCard(name="coverage", title="Coverage of what was asked about", is_final=is_final),
        FigureCard(name="radius", title="Covering radius", is_final=is_final),
    ]
    if run.has(QUERY):
        cards.append(FigureCard(name="paid_scores", title="Paid scores", is_final=run.last(QUERY) is not None))
    rows = [
        ["strategy", NOT_RUN if selection is None else selection.strategy],
        ["candidates", number_of(selection, lambda found: found.num_candidates)],
        ["selected", number_of(selection, lambda found: found.num_selected)],
    ]
    if selection is not None and selection.num_unread:
        rows.append(["the evaluator abstained from", number(selection.num_unread)])
    if selection is not None and selection.batches:
        sizes = ", ".join(number(batch.num_asked) for batch in selection.batches)
        rows.append(["asked in batches of", sizes])
        if selection.is_enough:
            stop_at = f"since select.stop_at = {run.config.select.stop_at} is reached"
            rows.append([f"not asked, {stop_at}", number(selection.num_unspent)])
        elif selection.num_unspent:
            rows.append(["of the budget not asked", number(selection.num_unspent)])
    if selection is not None and selection.radius:
        rows.append(["covering radius at the end", number(selection.radius[-1], ".4g")])
    cards.append(Table(head=["selection", ""], rows=rows))
    return Section(title="What was asked", parts=[Grid(cards=cards)])


def _evaluator(facts: RunFacts) -> Section | None:
    run = facts.run
    if not run.has(FIT_EVALUATOR):
        return None
    fitted = run.last(FIT_EVALUATOR)
    validation = None if fitted is None else fitted.validation
    spearman = None if validation is None else validation.spearman
    num = "none" if spearman is None else number(spearman.num)
    rows = [
        [f"Spearman, held-out judgements ({num})", estimate_of(validation, lambda found: found.spearman)],
        ["held-out judgements within one point", number_of(validation, lambda found: found.within_one, ".1%")],
        ["validation loss", number_of(validation, lambda found: found.loss, ".4g")],
    ]
    if fitted is not None and fitted.num_too_long + fitted.validation.num_too_long:
        num = f"{number(fitted.num_too_long)} / {number(fitted.validation.num_too_long)}"
        rows.append(["too long for its context: learnt from / held out", num])
    note = "Each point is a bin of held-out judgements; the number is how many it holds."
    cards = [
        Table(head=["the evaluator's agreement with the oracle", ""], rows=rows),
        FigureCard(name="calibration", title="Evaluator calibration", note=note, is_final=fitted is not None),
    ]
    return Section(title="The evaluator", parts=[Grid(cards=cards)])


def _label_meter(facts: RunFacts) -> Section | None:
    meter = facts.meter
    if meter is None:
        return None
    note = (
        "Agreement is the share of held-out pairs that are ordered as the oracle orders them, 0.5 by chance. Linear "
        "heads on the vectors of the selection stand for the evaluator; labels are labels like those that were paid. "
        "Reachable is what any number of them would reach, and shares of it are of the way from 0.5. Intervals hold "
        "with 90%, for each answer alone."
    )
    cards = [
        Table(head=["the labels", "90% interval in brackets"], rows=meter_rows(meter), has_wide_names=True),
        FigureCard(
            name="meter",
            title="Learning curve of the labels",
            note="Bars are standard errors; the measurements share their labels, and so their errors.",
            is_final=True,
        ),
    ]
    return Section(
        title="What more labels would buy",
        parts=[Paragraph(text=advice(meter), is_note=False), Grid(cards=cards), Paragraph(text=note)],
    )


def _reward_models(facts: RunFacts) -> Section | None:
    run = facts.run
    if not run.has(PREFERENCES):
        return None
    models = [reward.model for reward in facts.rewards]
    members = ", mean of the members" if run.config.reward_model.num_members > 1 else ""
    measures: list[tuple[str, Callable[[RewardModelFacts | None], str]]] = [
        ("accuracy", lambda model: estimate_of(model, lambda found: found.validation.accuracy)),
        (f"calibration error{members}", lambda model: number_of(model, lambda found: found.calibration_error, ".3f")),
        (
            "rank correlation with length",
            lambda model: estimate_of(model, lambda found: found.validation.length_correlation, signed=True),
        ),
        ("mean margin", lambda model: number_of(model, lambda found: found.validation.mean_margin, ".3f")),
        ("pairs learnt from", lambda model: number_of(model, lambda found: found.num_pairs)),
        ("held-out pairs", lambda model: number_of(model, lambda found: found.validation.num)),
        ("members", lambda model: number_of(model, lambda found: found.num_members)),
    ]
    rows = [[name, *map(show, models)] for name, show in measures]
    source = "" if run.config.asks_for_comparisons else " (of a file)"
    cards = [
        Table(head=["held-out pairs", *(reward.title for reward in facts.rewards)], rows=rows),
        Table(head=[f"preferences{source}", ""], rows=list(_preferences(facts))),
    ]
    return Section(title="Preferences and reward models", parts=[Grid(cards=cards)])


def _preferences(facts: RunFacts) -> Iterator[list[str]]:
    preferences = facts.run.last(PREFERENCES)
    yield ["pairs", number(facts.paid.num_pairs)]
    if not facts.run.config.asks_for_comparisons:
        file = None if preferences is None else preferences.file
        yield ["prompts", number_of(file, lambda found: found.num_prompts)]
        yield ["rows read", number_of(file, lambda found: found.num_rows)]
        if file is not None and file.num_truncated + file.num_too_long:
            num = f"{number(file.num_truncated)} / {number(file.num_too_long)}"
            yield ["pairs cut to the context / left out, as their prompts fill it", num]
        return
    asked = None if preferences is None else preferences.asked
    yield ["pairs of responses asked about", number_of(asked, lambda found: found.num_asked)]
    yield ["ties", number_of(asked, lambda found: found.counts.num_ties)]
    yield ["abstentions", number_of(asked, lambda found: found.counts.num_abstained)]
    yield ["disagreements of the two orders", number_of(asked, lambda found: found.counts.num_disagreements)]
    first_share = number_of(asked, lambda found: found.counts.first_position_share, ".1%")
    yield ["wins of the first position", first_share]


def _agreement(facts: RunFacts) -> Section | None:
    """Every reward on every policy's answers."""
    if not facts.rewards:
        return None
    titles = [reward.title for reward in facts.rewards]
    order = _agreement_rows(facts, lambda found: found.accuracy, "compared (ties left out)")
    rank = _agreement_rows(facts, lambda found: found.spearman, "ranked")
    cards = [
        Table(head=["orders an answer and M1's as the oracle does", *titles], rows=order),
        Table(head=["rank correlation (Spearman) with the oracle's scores", *titles], rows=rank),
    ]
    return Section(title="Rewards on the policies' answers", parts=[Grid(cards=cards)])


def _agreement_rows(
    facts: RunFacts, measure: Callable[[RewardEvaluation], Estimate | None], counted: str
) -> list[list[str]]:
    """Make a row of estimates for each policy but M1, then one of how many answers each of them is of."""
    is_run = facts.run.last(EVALUATE) is not None
    estimates: list[list[str]] = []
    nums: list[list[str]] = []
    for policy in facts.policies:
        if policy.name == M1:
            continue
        name = f"answers of {policy.title}"
        estimates.append([name])
        nums.append([f"{name} {counted}"])
        for reward in facts.rewards:
            agreement = reward.agreement.get(policy.name)
            estimate = None if agreement is None else measure(agreement)
            estimates[-1].append(plus_minus(estimate) if is_run else NOT_RUN)
            nums[-1].append(number(None if estimate is None else estimate.num, missing="-" if is_run else NOT_RUN))
    return estimates + nums


def _ppo(facts: RunFacts) -> Section | None:
    run = facts.run
    stages = [stage for stage in (PPO, PPO_REFRESHED) if run.has(stage)]
    if not stages:
        return None
    trained = [run.last(stage) for stage in stages]
    note = ""
    if any(metrics is not None and metrics.overlap for metrics in trained):
        note = (
            "With ppo.overlap generation and reward run while the policy trains: the parts then add up to more than "
            "the time that passed."
        )
    titles = ppo_titles(run.config)
    cards = [
        Table(head=["", *(titles[stage.name] for stage in stages)], rows=_ppo_rows(trained)),
        FigureCard(name="times", title="Where PPO's time went", note=note),
    ]
    return Section(title="PPO", parts=[FigureCard(name="ppo", title="Curves of PPO"), Grid(cards=cards)])


def _ppo_rows(trained: list[PpoMetrics | None]) -> list[list[str]]:
    measures: list[tuple[str, str, Callable[[PpoMetrics], float | None]]] = [
        ("reward, first rollout", ".3f", lambda metrics: metrics.first_reward),
        ("reward, last tenth", ".3f", lambda metrics: metrics.final_reward),
        ("held-out reward, best", ".3f", lambda metrics: metrics.best_held_out_reward),
        ("KL, nats per response", ",.2f", lambda metrics: metrics.final_kl),
        ("responses", ",d", lambda metrics: metrics.num_responses),
        ("without a reward", ",d", lambda metrics: metrics.num_abstained),
        (f"{INDENT}too long for its context", ",d", lambda metrics: metrics.num_too_long),
        (f"{INDENT}no answer within ppo.function_timeout_s", ",d", lambda metrics: metrics.num_timed_out),
        ("samples per second", ",.1f", lambda metrics: metrics.samples_per_s),
        ("generation, s", ",.1f", lambda metrics: metrics.generate_s),
        ("reward, s", ",.1f", lambda metrics: metrics.reward_s),
        ("training, s", ",.1f", lambda metrics: metrics.train_s),
        ("weight sync, s", ",.1f", lambda metrics: metrics.sync_s),
        ("weight sync, share of the time", ".1%", lambda metrics: metrics.sync_share),
        ("replica from trainer, nats per token", ".1e", lambda metrics: metrics.sampler_difference),
    ]
    finished = [metrics for metrics in trained if metrics is not None]
    rows: list[list[str]] = []
    for name, pattern, measure in measures:
        # Reasons are shown where they occur.
        if name.startswith(INDENT) and not any(measure(metrics) for metrics in finished):
            continue
        rows.append([name, *(number_of(metrics, measure, pattern) for metrics in trained)])
    return rows


def _tracked_rewards(facts: RunFacts) -> Section | None:
    if not facts.run.has(TRACK_REWARDS):
        return None
    tracked = facts.run.last(TRACK_REWARDS)
    num_scored = number_of(tracked, lambda found: found.num_scored)
    note = (
        f"The oracle scored two answers to each of some held-out prompts ({num_scored} in all) at a few points of each "
        "PPO, M1 first; answers it ties are left out of the shares. Bars are standard errors over prompts."
    )
    name = "The reward models along PPO"
    figure = FigureCard(name="tracked", title=name, is_final=tracked is not None)
    return Section(title=name, parts=[figure, Paragraph(text=note)])


def _synthetic_pairs(facts: RunFacts) -> Section | None:
    """The refresh of the reward model, or the synthetic pairs that join proxy DPO's."""
    run = facts.run
    is_refresh = run.config.learns_from_comparisons
    name = "The refresh" if is_refresh else "Synthetic preferences"
    if run.has(SYNTHESIZE):
        return Section(title=name, parts=[*_nothing_accepted(facts), Grid(cards=_synthesis_cards(facts))])
    if not is_refresh:
        return None
    match run.config.refresh.method:
        case "ocrm":
            weight = number_of(run.last(IMPORTANCE), lambda found: found.mean_weight, ".3f")
            text = f'The control "ocrm": the old preferences were weighted, nothing was paired. Mean weight: {weight}.'
        case "uml":
            num = number_of(run.last(SAMPLES), lambda found: found.num_responses)
            text = f"Multi-view learning on {num} samples of plain PPO; nothing was paired."
        case _:
            text = (
                'The control "none": the second PPO learns from the old reward model. Nothing was sampled, paired or '
                "refitted."
            )
    return Section(title=name, parts=[Paragraph(text=text, is_note=False)])


def _nothing_accepted(facts: RunFacts) -> Iterator[Notice]:
    effect = effect_of_no_pairs(facts.run)
    if effect is not None:
        num_prompts = number_of(facts.run.last(SYNTHESIZE), lambda found: found.num_prompts)
        yield Notice(title="No pair was accepted", text=f", of {num_prompts} prompts: {effect}")


def _synthesis_cards(facts: RunFacts) -> list[Card]:
    run = facts.run
    method = run.config.refresh.method
    is_final = run.last(SYNTHESIZE) is not None
    cards: list[Card] = []
    # Proxy DPO is refused with another method than "spg".
    if method in ("reward_pairs", "self_judged"):
        judge = "by the policy's own judgement" if method == "self_judged" else "by the old reward model"
        cards.append(
            Remark(
                text=f"A control that ranks responses: the best of a prompt's {run.config.refresh.n} samples {judge} "
                "is paired with the worst; nothing was clustered"
            )
        )
    else:
        name = "Confidence of the largest cluster"
        note = (
            "The share of a prompt's samples that mean the same. A bin holds its right end: a confidence of gamma "
            "itself is accepted."
        )
        cards.append(FigureCard(name="confidences", title=name, note=note, is_final=is_final))
        name, note = "Pairs accepted at each gamma", "One run's clusters, read at other thresholds."
        cards.append(FigureCard(name="gamma", title=name, note=note, is_final=is_final))
    cards.append(Table(head=["synthetic preferences", ""], rows=list(_synthesis_rows(facts))))
    return cards


def _synthesis_rows(facts: RunFacts) -> Iterator[list[str]]:
    run = facts.run
    synthesized, audited = run.last(SYNTHESIZE), run.last(AUDIT_PAIRS)
    if run.has(SAMPLES):
        yield ["samples of plain PPO", number_of(run.last(SAMPLES), lambda found: found.num_responses)]
    yield ["prompts", number_of(synthesized, lambda found: found.num_prompts)]
    yield ["pairs", number_of(synthesized, lambda found: found.num_pairs)]
    yield ["acceptance rate", number_of(synthesized, lambda found: found.acceptance_rate, ".1%")]
    outcomes = {} if synthesized is None else synthesized.outcomes
    for reason, num in outcomes.items():
        if reason != "accepted":
            yield [f"refused: {reason.replace('_', ' ')}", number(num)]
    lengths = None if synthesized is None else synthesized.lengths
    if lengths is not None:
        yield ["length of the chosen, tokens", number(lengths.chosen_tokens, ",.1f")]
        yield ["length of the rejected, tokens", number(lengths.rejected_tokens, ",.1f")]
        yield ["gap, tokens", number(lengths.gap_tokens, "+,.1f")]
        yield ["gap, characters", number(lengths.gap_chars, "+,.1f")]
    if run.has(AUDIT_PAIRS):
        num_audited = number_of(audited, lambda found: found.num_audited)
        agreement = estimate_of(audited, lambda found: found.accuracy, percent=True)
        yield [f"of {num_audited} possible pairs the oracle agrees with", agreement]
    costs = None if synthesized is None else synthesized.entailment
    if costs is not None:
        yield ["pairs read by the entailment model", number(costs.num_nli_calls)]
        yield ["of pairs of samples", number(costs.num_sample_pairs)]
        yield ["decided without: repeated texts", number(costs.deduplicated_share, ".1%")]
        yield ["read without their ends", number(costs.num_truncated_pairs)]


def _compute(facts: RunFacts) -> Section:
    config, compute = facts.run.config, facts.compute
    first = duration(compute.first_policy_s, missing=NOT_RUN)
    added = duration(compute.added_s, missing=NOT_RUN)
    total = duration(compute.training_s, missing=NOT_RUN)
    if config.learns_from_comparisons:
        is_control = config.refresh.method == "none"
        name = "both PPOs" if is_control else "RLP"
        what = "the second PPO" if is_control else "RLP: samples, refresh and the second PPO"
        rows = [
            ["plain RLHF: everything up to the first PPO", first],
            [f"added by {what}", added],
            [f"{name} in all", total],
            [f"{name}, times plain RLHF", number(compute.ratio, ".2f")],
        ]
    else:
        training = "DPO" if facts.run.has(DPO) else "PPO"
        if config.rounds == 1:
            rows = [[f"everything up to the end of {training}", first]]
        else:
            rows = [
                [f"everything up to the end of {training} in the first round", first],
                ["added by later rounds", added],
                ["all rounds", total],
            ]
    evaluation = duration(compute.evaluate_s, missing=NOT_RUN)
    rows.append(["evaluation of all policies, not counted above", evaluation])
    return Section(title="Compute", parts=[Table(head=["finished stages", "time"], rows=rows)])


def _training(facts: RunFacts) -> Section | None:
    run = facts.run
    stages = training_stages(run)
    if not stages:
        return None
    names = ", ".join(stage.name for stage in stages)
    parts: list[Card | Paragraph] = [FigureCard(name="curves", title=f"Training curves of {names}")]
    notes = [f"{stage.name}: {NOT_RUN}." for stage in stages if run.last(stage) is None]
    sft = run.last(SFT)
    if sft is not None and sft.num_truncated + sft.num_too_long:
        notes.append(
            f"{SFT.name}: {number(sft.num_truncated)} responses cut to the context, and "
            f"{number(sft.num_too_long)} examples left out because their prompts fill it."
        )
    dpo = run.last(DPO)
    if dpo is not None:
        speed, padding = number(dpo.tokens_per_s), number(dpo.padding_share, ".1%")
        notes.append(f"{DPO.name}: {speed} tokens per second, {padding} padding.")
    if notes:
        parts.append(Paragraph(text=" ".join(notes)))
    return Section(title="Other training" if run.has(PPO) else "Training", parts=parts)
