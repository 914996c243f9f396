"""Checks of the engines' settings against the policy and vLLM, neither of which is loaded."""

import ast
import difflib
import importlib.util
from pathlib import Path

from rayrl.config import RunConfig
from rayrl.errors import ConfigError
from rayrl.preflight.model import ModelFacts

known_arguments: set[str] = set()
"""Entries of `engine_args` that engines other than vLLM's take; simulated ones add theirs."""


def check_engines(config: RunConfig, model: ModelFacts) -> None:
    """Refuse engines that cannot split the policy, and arguments that vLLM does not have.

    Raises:
        ConfigError: names the fleet's setting.
    """
    for role, engine in (("generators", config.generators), ("embedders", config.embedders)):
        if role == "embedders" and config.select.embedder != "policy":
            continue  # another model, and never split
        ranks, heads = engine.tensor_parallel_size, model.num_heads
        if heads and heads % ranks:
            fitting = [str(number) for number in range(1, heads + 1) if heads % number == 0]
            raise ConfigError(
                f"{role}.tensor_parallel_size must divide the policy's {heads} attention heads, got {ranks}; set it to "
                f"one of {', '.join(fitting)}"
            )
        if model.num_layers and engine.pipeline_parallel_size > model.num_layers:
            raise ConfigError(
                f"{role}.pipeline_parallel_size must be at most the policy's {model.num_layers} layers, got "
                f"{engine.pipeline_parallel_size}; lower it"
            )
    for role, engine in (("generators", config.generators), ("embedders", config.embedders)):
        unknown = engine.engine_args.keys() - known_arguments
        fields = _vllm_arguments() if unknown else set[str]()
        for name in sorted(unknown - fields if fields else ()):
            near = difflib.get_close_matches(name, fields, n=1)
            remedy = f"did you mean {near[0]}?" if near else "leave it out"
            raise ConfigError(f"{role}.engine_args: vLLM has no argument {name} (vllm.AsyncEngineArgs); {remedy}")


def _vllm_arguments() -> set[str]:
    """Read the fields of vLLM's `AsyncEngineArgs` from its source, which takes seconds to import; none without vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return set()
    source = Path(spec.submodule_search_locations[0], "engine", "arg_utils.py")
    if not source.is_file():
        return set()
    names: set[str] = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs"):
            names |= {
                field.target.id
                for field in node.body
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            }
    return names
