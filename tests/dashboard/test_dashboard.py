"""Pages that a user sees: every query of the Grafana dashboard over real runs, and Ray's own pages in a browser."""

import json
import math
import re
import subprocess
from itertools import pairwise

import pytest

from rayrl.metrics import meters, prometheus
from tests.dashboard.watched import ROOT, watched

pytestmark = [pytest.mark.dashboard, pytest.mark.timeout(3600)]

DASHBOARD = json.loads((ROOT / "cluster" / "grafana" / "rayrl.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
QUIET = {
    meters.RESTARTS.exported,
    meters.HUNG.exported,
    meters.REUSED.exported,
    meters.BUDGET_USD.exported,
    meters.ENTAILED.exported,
    "ray_vllm_num_preemptions_total",
    "ray_vllm_prefix_cache_hits_total",
}
"""What two small runs in which nothing goes wrong need not have."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with watched(tmp_path_factory.mktemp("watched")) as runs:
        yield runs


def of_a_minute(query):
    """The query as Grafana asks it, for all runs."""
    return query.replace("$run", ".*").replace("$window", "1m")


def test_prometheus_has_every_metric_and_no_undocumented_one(runs):
    defined = {meter.exported for meter in prometheus.defined()}
    seen = {name for name in runs.names() if name.startswith("ray_rayrl_")}
    assert seen - defined == set()
    assert defined - seen <= QUIET


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_has_an_answer(runs, query):
    series = runs.series(of_a_minute(query))
    values = [float(value) for one in series for _, value in one["values"]]
    assert any(map(math.isfinite, values)) or set(re.findall(r"\bray_\w+", query)) & QUIET


def test_a_run_can_be_chosen(runs):
    chosen = runs.series(f'{meters.RUN.exported}{{run="watched-rlp"}}')
    assert chosen and {one["metric"]["run"] for one in chosen} == {"watched-rlp"}
    fleets = runs.series(f'{meters.TOKENS.exported}{{run="watched-proxy_dpo"}}')
    assert {one["metric"]["fleet"] for one in fleets} >= {"watched-proxy_dpo-generators"}
    assert runs.series('ray_vllm_generation_tokens_total{model_name="watched-proxy_dpo-generators"}')


def test_counts_are_those_of_the_run(runs):
    """The labels paid for: what Prometheus has counted, what it was last shown, and the budget."""
    label = '{run="watched-proxy_dpo", purpose="label"'
    (judged,) = runs.series(f"sum({meters.JUDGEMENTS.exported}{label}}})")
    (spent,) = runs.series(f"max({meters.SPENT.exported}{label}}})")
    (budget,) = runs.series(f"max({meters.BUDGET.exported}{label}}})")
    assert float(judged["values"][-1][1]) == float(spent["values"][-1][1]) == float(budget["values"][-1][1]) == 24


def test_a_gauge_stays_while_its_process_lives_and_goes_with_it(runs):
    (series,) = runs.series(f'max({meters.RUN.exported}{{run="watched-proxy_dpo"}})')
    times = [at for at, _ in series["values"]]
    assert max(after - before for before, after in pairwise(times)) <= 15
    assert runs.over - times[-1] > 60  # the second run lasts longer than that


def test_actors_and_tasks_have_names_that_say_what_they_are(runs):
    from ray.util.state import list_actors, list_tasks

    ours = {"Generator", "Embedder", "Router", "OraclePool", "BlockShard"}
    actors = list_actors(address=runs.dashboard, limit=1000)
    assert {actor["class_name"] for actor in actors} >= ours
    names = {actor["name"] for actor in actors if actor["class_name"] in ours}
    assert all(name.startswith(("watched-proxy_dpo-", "watched-rlp-")) for name in names)
    assert {"watched-proxy_dpo-generators-0", "watched-proxy_dpo-oracle", "watched-proxy_dpo-coreset-0"} <= names
    tasks = {task["name"] for task in list_tasks(address=runs.dashboard, limit=10_000)}
    for step in ("generate", "pair", "train"):
        assert any(f"MapBatches({step})" in task for task in tasks), tasks


def test_the_actors_page_shows_them(runs, tmp_path):
    browser = [runs.chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    page = [*browser, "--window-size=1600,1200", "--virtual-time-budget=20000", "--dump-dom"]
    shown = subprocess.run([*page, f"{runs.dashboard}/#/actors"], capture_output=True, text=True, timeout=180)
    assert re.search(r"watched-(proxy_dpo|rlp)-[\w-]+", shown.stdout), shown.stdout[-3000:] + shown.stderr[-1000:]
