"""Fragments of trained parameters: an optimizer's state, saved for any number of ranks and any ZeRO stage to load.

DeepSpeed's optimizers step float32 tensors of their own, here called masters. Without ZeRO a master is a whole
parameter, and all ranks have the same ones. With ZeRO 1 and 2 a rank has one master per parameter group: its part of
the group's parameters, laid end to end. With ZeRO 3 it has a part of every parameter, many of them in one master.
Whatever the layout, a parameter's share of a master is a stretch of the flattened parameter: a fragment. A checkpoint
is the fragments of all ranks with the optimizer's state for them, and a rank finds its own stretches in those of any
layout.

DeepSpeed's own way is its universal checkpoints. In 0.19.8 they are made from checkpoints of ZeRO only, by a conversion
that writes everything once more; and ZeRO 3 gives all parameter groups the learning rate of the first one.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Fragment(NamedTuple):
    """A stretch of a trained parameter that lies in a master of this rank."""

    name: str
    """Of the parameter, in the module."""
    start: int
    """Of the stretch, in the flattened parameter."""
    length: int
    master: Tensor
    """What the optimizer steps; it holds the stretch, and may hold others."""
    offset: int
    """Of the stretch, in the flattened master."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return the stretch as a view of the master, or of a state of the optimizer, which has the master's shape."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)


class SavedFragment(TypedDict):
    """A fragment in a checkpoint."""

    name: str
    start: int
    weight: Tensor
    """(length,)"""
    state: dict[str, Tensor]
    """Of the optimizer, by its names: (length,) each, or a scalar, which counts steps. Empty before the first step."""


def saved_fragments(engine: Any) -> list[SavedFragment]:
    """Return views of this rank's part of a checkpoint; where all ranks hold the same, rank 0 has all of it."""
    if engine.zero_optimization_stage() == 0 and dist.is_initialized() and dist.get_rank() != 0:
        return []
    saved: list[SavedFragment] = []
    for fragment in _fragments(engine):
        state = engine.basic_optimizer.state.get(fragment.master, {})
        saved.append(
            {
                "name": fragment.name,
                "start": fragment.start,
                "weight": fragment.of(fragment.master),
                "state": {key: value if value.dim() == 0 else fragment.of(value) for key, value in state.items()},
            }
        )
    return saved


def load_fragments(engine: Any, saved: Sequence[SavedFragment]) -> None:
    """Give the engine the weights and the optimizer's state of a checkpoint. All ranks take part.

    Args:
        engine: a DeepSpeed engine around the model that was trained, in any layout.
        saved: the fragments of all ranks that wrote the checkpoint.
    """
    by_name: defaultdict[str, list[SavedFragment]] = defaultdict(list)
    for each in saved:
        by_name[each["name"]].append(each)
    states: dict[Tensor, dict[str, Tensor]] = engine.basic_optimizer.state
    for state in states.values():
        for value in state.values():
            value.zero_()
    for fragment in _fragments(engine):
        num_found = sum(_take(fragment, each, states) for each in by_name[fragment.name])
        assert num_found >= fragment.length, f"{fragment.name} is not whole in the checkpoint"
    _copy_to_module(engine)


def _take(fragment: Fragment, saved: SavedFragment, states: dict[Tensor, dict[str, Tensor]]) -> int:
    """Copy what a fragment has in common with a saved one, and return the number of elements."""
    start = max(fragment.start, saved["start"])
    stop = min(fragment.start + fragment.length, saved["start"] + len(saved["weight"]))
    if start >= stop:
        return 0
    into = slice(start - fragment.start, stop - fragment.start)
    out_of = slice(start - saved["start"], stop - saved["start"])
    master = fragment.master
    fragment.of(master)[into].copy_(saved["weight"][out_of])
    state = states[master]
    for key, value in saved["state"].items():
        if value.dim() == 0:
            # A master of several parameters has one count of steps. Without ZeRO each has its own, which is lower for a
            # parameter that had no gradient in some steps.
            found = value.to(master.device, copy=True)  # one saved count may be that of many masters
            state[key] = torch.maximum(state[key], found) if key in state else found
        else:
            if key not in state:
                state[key] = torch.zeros_like(master)
            fragment.of(state[key])[into].copy_(value[out_of])
    return stop - start


def _fragments(engine: Any) -> Iterator[Fragment]:
    """Find all fragments of this rank."""
    optimizer = engine.optimizer
    whole = {id(parameter): master for parameter, master in _whole_masters(engine)}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in whole:
            yield Fragment(name, 0, parameter.numel(), whole[id(parameter)], 0)
        elif engine.zero_optimization_stage() == 3:
            sub_group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = length * optimizer._get_param_partition_rank(parameter)
            length = min(length, parameter.ds_numel - start)  # the last parts are padded to the length of the others
            if length > 0:
                yield Fragment(name, start, length, optimizer.fp32_partitioned_groups_flat[sub_group], offset)
        elif (mapping := parameter._hp_mapping) is not None:
            part = mapping.lp_fragment_address
            (master,) = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
            yield Fragment(name, part.start, part.numel, master, mapping.hp_fragment_address.start)


def _whole_masters(engine: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield the trained parameters without ZeRO, each with its master, which in float32 is the parameter itself."""
    if engine.zero_optimization_stage() > 0:
        return
    optimizer, groups = engine.optimizer, engine.basic_optimizer.param_groups
    parameters = [group["params"] for group in groups] if optimizer is engine.basic_optimizer else optimizer.fp16_groups
    for of_group, group in zip(parameters, groups, strict=True):
        yield from zip(of_group, group["params"], strict=True)


def _copy_to_module(engine: Any) -> None:
    """Copy the masters, rounded where they have to be, to the parameters of the module on all ranks."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for parameter, master in _whole_masters(engine):
            parameter.data.copy_(master.data)
    elif stage == 3:
        optimizer.checkpoint_event_prologue()
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
