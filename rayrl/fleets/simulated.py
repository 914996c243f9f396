"""Services whose engines are simulated: rehearse a run, test its recovery, or measure its scale without a model.

`SimulatedServices` takes the place of `Services` and has the same arguments. Fleets, routers, blocks, tables, oracle
and trainings are the real ones; only generation and embedding replicas are those of `rayrl.engines.simulated`, whose
docstring describes their times and answers. The entailment model is not simulated. `jobs/rehearsal.py` runs a whole
pipeline this way.
"""

from rayrl.engines.simulated import SimulatedEmbedder, SimulatedGenerator
from rayrl.fleets.services import Services


class SimulatedServices(Services):
    """Services with simulated generation and embedding replicas."""

    generator_class = SimulatedGenerator
    embedder_class = SimulatedEmbedder
