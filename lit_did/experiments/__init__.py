"""Controlled experiments on what the DID's theory claims: `python -m lit_did.experiments NAME`.

Each is a module of this package, loaded when it is asked for, with a function `run(options: Options) -> Report`
(`lit_did.experiments.reporting`). A new one needs a line here and nothing else.
"""

from typing import NamedTuple


class Experiment(NamedTuple):
    """What the command line knows before an experiment's module is loaded."""

    question: str
    seeds: int
    """replicates, unless told otherwise; of those that train a language model, as many as fit some twenty minutes"""


EXPERIMENTS = {
    "reward": Experiment("which preference loss learns the target policy, on the power law and off it", 5),
    "dynamics": Experiment("what DPO does to likelihoods and to the policy's entropy, against the theory", 3),
    "entropy": Experiment("the entropy of a real language model's DID after DPO and DPO-PG, and what was learned", 3),
}
"""{name of the module: what it is}"""

__all__ = ["EXPERIMENTS", "Experiment"]
