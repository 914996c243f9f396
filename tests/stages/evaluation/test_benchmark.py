"""lm-evaluation-harness on a local task, through its vLLM backend."""

import json

import pytest

from rayrl.config import load_config
from rayrl.runs.run import Run
from rayrl.stages.evaluation.benchmark import benchmark

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


class OnCpu:
    on_gpu = False
    dtype = "float32"


def test_a_local_task_is_scored(ray_cluster, tiny_policy, tmp_path):
    questions = [
        {"question": "How do I boil rice?", "choices": [" First add water.", " qzx qzx"], "answer": 0},
        {"question": "How do I wash shirts?", "choices": [" zzk vvw", " First use cold water."], "answer": 1},
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(data=data))
    config = load_config(
        "jobs/configs/quickstart.toml",
        ['evaluate.lm_eval.tasks=["tiny_choice"]', f"evaluate.lm_eval.include_path={tmp_path}", f"run_dir={tmp_path}"],
    )
    results = benchmark(Run(config=config, url=str(tmp_path)), OnCpu(), {"m1": tiny_policy.checkpoint})
    assert results["m1"]["tiny_choice"]["acc,none"] == pytest.approx(1.0)
