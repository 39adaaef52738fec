"""Controlled experiments on what the DID's theory claims: `lit-did experiment NAME`.

Each is a module of this package with a function `run(options: Options) -> Report` (`lit_did.experiments.reporting`),
loaded on request. A new experiment needs its module and a line here.
"""

from typing import NamedTuple


class Experiment(NamedTuple):
    """What the command line needs before an experiment's module is loaded."""

    question: str
    seeds: int
    """replicates by default; experiments that train a language model take as many as fit some twenty minutes"""


EXPERIMENTS = {
    "reward": Experiment("which preference loss learns the target policy, on the power law and off it", 5),
    "dynamics": Experiment("what DPO does to likelihoods and to the policy's entropy, against the theory", 3),
    "target": Experiment("how far draws from the target, token by token, are from the policy that DPO ends at", 20),
    "entropy": Experiment("the entropy of a real language model's DID after DPO and DPO-PG, and what was learned", 3),
}
"""{name of the module: what it asks}"""

__all__ = ["EXPERIMENTS", "Experiment"]
