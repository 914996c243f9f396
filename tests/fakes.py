"""Fakes that several tests share: a run whose every stage is finished, made-up metrics, and made-up responses."""

import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass

from rayrl.records import Response, Sampled
from rayrl.runs.run import Manifest, Run


def made_up(cls, **values):
    """An instance of a metrics class with a value of the right type in every field that is not given."""
    hints = typing.get_type_hints(cls)
    return cls(**{f.name: values.get(f.name, _made_up_value(hints[f.name])) for f in fields(cls)})


def _made_up_value(annotation):
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union) and type(None) in arguments:
        return None
    if origin is list:
        return [_made_up_value(arguments[0])]
    if origin is dict:
        return {}
    if is_dataclass(annotation):
        return made_up(annotation)
    return {int: 1, float: 0.5, str: "made up", bool: False}[annotation]


@dataclass(kw_only=True)
class FinishedRun(Run):
    """A run whose every stage is finished, whatever its key; `keys` are those that were asked for, by stage name."""

    keys: dict[str, str] = field(default_factory=dict)

    def finished(self, stage, key):
        self.keys[stage.name] = key
        return self.manifest(stage, key)

    def manifest(self, stage, key="made up"):
        metrics = made_up(stage.metrics)
        return Manifest(stage=stage.name, key=key, seconds=0.0, num_rows=1, metrics=metrics, summary="", finished_at="")


class OnlyEmbedders:
    """The one service that embedding may use."""

    dtype = "float32"

    def __init__(self, fleet):
        self.fleet = fleet

    def embedders(self, checkpoint, pooling):
        return self.fleet

    def ready(self, fleet):
        return fleet


def sampled(num, prompt="p"):
    """A prompt with `num` different responses."""
    responses = [
        Response(
            id=f"{prompt}-{i}",
            text=f"text {i}",
            token_ids=[10 + i, 2],
            seed=i,
            policy_version="m1",
            logprob=-float(i),
            finish_reason="stop",
        )
        for i in range(num)
    ]
    return Sampled(prompt_id=prompt, prompt="?", prompt_token_ids=[1, 5], responses=responses)
