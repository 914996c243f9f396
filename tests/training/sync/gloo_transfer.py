"""vLLM's weight transfer over gloo, one tensor at a time: what NCCL does on GPUs, on a machine that has none.

Replicas import this file as their `worker_extension_cls`, and thereby know the engine "gloo".
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

import torch
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
)

from rayrl.engines.worker import WorkerExtension
from rayrl.training.sync.transfer import Transport

TIMEOUT_S = 30.0


class Extension(WorkerExtension):
    """Nothing more: importing this file is what matters."""


def join(info, rank):
    return stateless_init_torch_distributed_process_group(
        info.master_address,
        info.master_port,
        rank,
        info.world_size,
        backend="gloo",
        timeout=timedelta(seconds=TIMEOUT_S),
    )


class GlooEngine(NCCLWeightTransferEngine):
    """A replica's end."""

    def init_transfer_engine(self, init_info):
        self.model_update_group = join(init_info, init_info.rank_offset + self.parallel_config.rank)

    def update_weights(self, update_info):
        info = self.parse_update_info(update_info)
        for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.model_update_group.broadcast(weight, 0).wait()
            self.model.load_weights([(name, weight)])

    def shutdown(self):
        self.model_update_group = None


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    backend: ClassVar[str] = "gloo"


class GlooTrainerEngine(NCCLTrainerWeightTransferEngine):
    """The trainer's end; the order of its calls is vLLM's."""

    @classmethod
    def trainer_init(cls, init_info, *, client, source=None):
        engine = cls(client=client, source=source)
        group = {name: getattr(init_info, name) for name in ("master_address", "master_port", "world_size")}
        payload = worker_init_payload(NCCLWeightTransferInitInfo(rank_offset=1, **group))
        with ThreadPoolExecutor(1) as calls:
            joined = calls.submit(client.init_weight_transfer_engine, payload)
            engine.model_update_group = join(init_info, 0)
            joined.result()
        return engine

    def _broadcast(self, source, meta):
        group = self.model_update_group
        for _, weight in self._checked_iter(source, meta):
            group.broadcast(weight.contiguous(), 0).wait()

    def shutdown(self):
        self.model_update_group = None


WeightTransferEngineFactory.register_engine("gloo", GlooEngine)
WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerEngine)

GLOO = Transport(init_info=GlooTrainerInitInfo, timeout_s=TIMEOUT_S)
EXTENSION = f"{__name__}.Extension"
