"""The metrics: what is defined, documented and drawn is one list, and the parts of a run feed it."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from rayrl.metrics import meters, prometheus
from rayrl.metrics.curves import MetricLog
from rayrl.metrics.prometheus import Counter, Gauge
from rayrl.records import Judgement

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "cluster" / "README.md").read_text()
DASHBOARD = json.loads((ROOT / "cluster" / "grafana" / "rayrl.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
RAYS_LABELS = {"run", "WorkerId", "model_name", "le"}


@pytest.fixture
def scratch():
    """Metrics of a test's own, which are not among the defined ones afterwards."""
    before = prometheus.defined()
    yield
    prometheus._METERS[:] = before


def documented():
    """Cells of every row of the guide's tables of metrics, by the metric's name."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in GUIDE.splitlines() if line.startswith("| `ray_")
    ]
    return {row[0].strip("`"): row[1:] for row in rows}


def names_in(query):
    return set(re.findall(r"\bray_\w+", query))


def test_names_are_unique_and_prometheus_accepts_them():
    names = [meter.exported for meter in prometheus.defined()]
    assert len(set(names)) == len(names) > 30
    assert all(re.fullmatch(r"ray_rayrl_[a-z][a-z_]*[a-z]", name) for name in names)
    assert not any(meter.name.endswith("_total") for meter in prometheus.defined())
    assert not any("run" in meter.labels for meter in prometheus.defined())


def test_the_guide_documents_every_metric_as_it_is():
    rows = {name: row for name, row in documented().items() if name.startswith("ray_rayrl_")}
    assert list(rows) == [meter.exported for meter in prometheus.defined()]
    for meter in prometheus.defined():
        kind, unit, labels, emitter, about = rows[meter.exported]
        assert (kind, unit, labels, about) == (
            type(meter).__name__.lower(),
            meter.unit,
            ", ".join(meter.labels),
            meter.about,
        )
        assert emitter


def test_the_dashboard_draws_every_documented_metric_and_no_other():
    drawn = set().union(*(names_in(target["expr"]) for target in TARGETS))
    assert {name.removesuffix("_bucket") for name in drawn} == set(documented())


def test_the_dashboards_variables_and_legends_are_labels_of_their_queries():
    labels = {meter.exported: set(meter.labels) for meter in prometheus.defined()}
    for target in TARGETS:
        (kept,) = {frozenset(re.split(r",\s*", by)) for by in re.findall(r"by \(([^)]+)\)", target["expr"])}
        known = set.intersection(*(labels.get(name, set()) | RAYS_LABELS for name in names_in(target["expr"])))
        assert kept <= known, target["expr"]
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, target["expr"]
        assert re.search(r'[{,](run=~"\$run"|model_name=~"\$run-\.\*")}', target["expr"])
    (run,) = [variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "run"]
    assert names_in(run["definition"]) == {meters.RUN.exported}


def test_counters_are_added_up_before_their_rate():
    """Each of Ray's workers is a series of its own, and one that comes and goes has no rate."""
    for target in TARGETS:
        assert not re.search(r"rate\((?!sum by)", target["expr"]), target["expr"]


def test_the_dashboards_panels_are_laid_out():
    assert DASHBOARD["uid"] == "rayrl"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    titles = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert titles == ["Run", "Fleets", "vLLM engines", "Selection", "Oracle", "Training"]


def test_a_counter_counts_and_a_gauge_holds(scratch):
    counter, gauge = Counter("test_c", "1", "", ("kind",)), Gauge("test_g", "1", "")
    counter.add(2, kind="a")
    counter.add(0, kind="a")
    counter.add(kind="b")
    assert counter.values == {("a",): 2.0, ("b",): 1.0}
    gauge.set(3)
    gauge.set(4)
    assert gauge.value() == 4.0
    gauge.set(float("nan"))
    assert gauge.values == {}


def test_a_measurement_names_every_label(scratch):
    counter = Counter("test_labels", "1", "", ("kind",))
    with pytest.raises(AssertionError, match=r"test_labels has the labels \('kind',\), got \('kin',\)"):
        counter.add(kin="a")


def test_without_ray_nothing_of_it_is_loaded():
    program = (
        "import sys\nfrom rayrl.metrics import meters\n"
        "meters.CALLS.add(fleet='f')\nmeters.LOSS.set(1.0, stage='sft')\n"
        "print('ray' in sys.modules, meters.CALLS.value(fleet='f'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "1.0"], done.stderr


def test_a_training_log_feeds_the_gauges(tmp_path):
    with MetricLog(str(tmp_path), "ppo") as log:
        log.log(1, loss=0.5, kl=2.0, reward=1.5, reward_margin=0.1, seconds=3.0, clip_fraction=0.2)
        log.log(2, loss=0.25, held_out_reward=float("nan"))
    assert meters.TRAINING_STEP.value(stage="ppo") == 2
    assert meters.LOSS.value(stage="ppo") == 0.25
    assert (meters.KL.value(stage="ppo"), meters.REWARD.value(stage="ppo")) == (2.0, 1.5)
    assert (meters.MARGIN.value(stage="ppo"), meters.STEP_SECONDS.value(stage="ppo")) == (0.1, 3.0)
    assert ("ppo",) not in meters.HELD_OUT_REWARD.values


def test_a_replica_is_in_one_state_and_serves_one_version():
    replica = {"fleet": "t-generators", "replica": "0"}
    meters.show_state("starting", replica)
    meters.show_state("swapping", replica)
    states = {key[-1]: value for key, value in meters.REPLICA_STATE.values.items() if key[0] == "t-generators"}
    assert states == {"starting": 0.0, "serving": 0.0, "swapping": 1.0}
    for version, shown in (
        ("m1", ("m1", 0.0)),
        ("0123-ppo-12", ("0123-ppo", 12.0)),
        ("0123", ("0123", 0.0)),
        ("best-of", ("best-of", 0.0)),
    ):
        meters.show_weights(version, replica)
        assert {key[-1]: value for key, value in meters.WEIGHT_VERSION.values.items()} == dict([shown])


def test_a_block_is_computed_once_and_then_kept(tmp_path):
    from rayrl.data.blocks import BlockTable

    table = BlockTable(f"{tmp_path}/metered/table", 1)
    for _ in range(3):
        table.memoised(0, lambda _: pa.table({"x": [1, 2]}))
    assert table.name == "metered/table"
    assert meters.BLOCKS.value(table=table.name, source="computed") == 1
    assert meters.BLOCKS.value(table=table.name, source="kept") == 2
    assert meters.ROWS.value(table=table.name) == 2


def test_the_oracle_pool_shows_what_it_spends(tmp_path):
    from rayrl.config import RubricConfig, ScriptedOracleConfig
    from rayrl.models.judge_prompt import load_rubric
    from rayrl.oracles.pool import OraclePool

    config = ScriptedOracleConfig(function="tests.oracles.length_oracle:judge")
    pool = OraclePool(config, load_rubric(RubricConfig()), str(tmp_path / "ledger.sqlite"), {"metered": 3})
    asked = [
        Judgement(prompt_id=f"p{i}", response_id=f"r{i}", prompt=f"prompt {i}", response="answer") for i in range(2)
    ]
    try:
        for _ in range(2):
            answers = asyncio.run(pool.judge(asked, "metered"))
    finally:
        pool.close()
    outcome = {"purpose": "metered", "kind": "judgement"}
    assert [answer.status for answer in answers] == ["scored", "scored"]
    assert meters.JUDGEMENTS.value(**outcome, outcome="scored") == 2
    assert meters.REUSED.value(purpose="metered") == 2
    assert meters.BUDGET.value(purpose="metered") == 3
    assert meters.SPENT.value(purpose="metered") == 2
    assert meters.ORACLE_IN_FLIGHT.value() == meters.ORACLE_WAITING.value() == 0
