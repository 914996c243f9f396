"""Configs of small runs for the tests of this folder, and the message of a refusal."""

import json
import math

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from rayrl.config import RunConfig
from rayrl.preflight import check

TWO_CPUS = {"CPU": 2.0}
MODEL = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}
MNLI = {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}
JUDGE = {"type": "http", "base_url": "http://127.0.0.1:9", "model": "m", "api_key_env": None}
EVALUATOR = {"ppo__reward": "evaluator", "preferences": None}
FUNCTION = {"ppo__reward": "function", "ppo__function": "json:dumps", "preferences": None}
PAIRS = [{"prompt": p, "chosen": "good", "rejected": "bad"} for p in ("p", "q", "q")]


def save_model(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL | changes))
    save_header(folder, layer_shapes(MODEL | changes))
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))  # a word, a token
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    return str(folder)


def layer_shapes(config):
    """Shapes of a small model of this config.json."""
    width = config["hidden_size"]
    shapes = {"embed_tokens.weight": (config["vocab_size"], width)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"layers.{number}.q_proj.weight": (width, width), f"layers.{number}.norm.weight": (width,)}
    return shapes


def save_header(folder, shapes, name="model.safetensors"):
    """A file of weights in float32, all zero: the file is sparse, and takes no room."""
    place, header = 0, {}
    for tensor, shape in shapes.items():
        end = place + 4 * math.prod(shape)
        header[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with open(folder / name, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)


def grow(folder, num_bytes):
    """Make a model's weights so large, about: a sparse file."""
    config = json.loads((folder / "config.json").read_text())
    save_header(folder, layer_shapes(config) | {"more": (num_bytes // 4,)})


def save_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def small_tree(tmp_path):
    """A run of 12 prompts, 2 held out, 4 responses each."""
    return {
        "name": "t",
        "run_dir": str(tmp_path / "run"),
        "policy": {"path": save_model(tmp_path / "model")},
        "pool": {
            "path": save_rows(tmp_path / "pool.jsonl", [{"prompt": f"p {i}"} for i in range(12)]),
            "num_eval": 2,
        },
        "sft": {"enabled": False},
        "generate": {"k": 4, "max_tokens": 16},
        "select": {"budget": 10},
        "oracle": {"type": "scripted", "function": "json:dumps"},
        "evaluate": {"budget": 4},
    }


def small_rlp_tree(tmp_path):
    """A run of 12 prompts, 2 held out; the oracle compares 2 of 4 responses each."""
    return small_tree(tmp_path) | {
        "pipeline": "rlp",
        "generate": {"k": 4, "max_tokens": 16, "block_size": 4},
        "select": {"budget": 10, "strategy": "random"},
        "oracle": {"type": "scripted", "function": "json:dumps", "compare_function": "json:loads"},
        "preferences": {"source": "oracle"},
        "refresh": {"n": 3, "spg": {"entailment_model": save_model(tmp_path / "nli", id2label=MNLI)}},
        "evaluate": {"budget": 6},
    }


def changed(tree, **changes):
    """The tree with dotted settings changed, as a config."""
    tree = json.loads(json.dumps(tree))
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return RunConfig.model_validate(tree)


def plan_of(tree, cluster=TWO_CPUS, **changes):
    return check(changed(tree, **changes), cluster=cluster)


def names(plan):
    return [stage.name for stage in plan.stages]


def pairs_of(tmp_path, rows):
    return {"source": "data", "data": {"path": save_rows(tmp_path / "pairs.jsonl", rows)}}


def refusal(error, config, cluster=TWO_CPUS, **options):
    """The one message of a refusal of exactly this class."""
    with pytest.raises(error) as caught:
        check(config, cluster=cluster, **options)
    assert type(caught.value) is error
    return str(caught.value)
