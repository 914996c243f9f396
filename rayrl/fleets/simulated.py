"""Services whose fleets hold simulated engines: rehearsals, fault tests and scale benches without a model."""

from typing import Any

from rayrl.engines.embedder import Embedder
from rayrl.engines.generator import Generator
from rayrl.engines.simulated import SimulatedEmbedder, SimulatedGenerator
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services


class SimulatedServices(Services):
    """Services whose fleets of engines are simulated."""

    def _fleet(self, name: str, engine: Any, *arguments: Any, **options: Any) -> Fleet:
        simulated = {Generator: SimulatedGenerator, Embedder: SimulatedEmbedder}[engine]
        return super()._fleet(name, simulated, *arguments, **options)  # type: ignore[arg-type]
