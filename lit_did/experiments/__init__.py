"""Controlled experiments on what the DID's theory claims: `python -m lit_did.experiments NAME`.

Each is a module of this package, loaded when it is asked for, with a function `run(options: Options) -> Report`
(`lit_did.experiments.reporting`). A new one needs a line here and nothing else.
"""

EXPERIMENTS = {
    "reward": "which preference loss learns the target policy, on the power law and off it",
    "dynamics": "what DPO does to likelihoods and to the policy's entropy, and what the DID's entropy says of it",
    "entropy": "the entropy of a real language model's DID after DPO and DPO-PG, and what it has learned",
}
"""{name of the module: the question}"""

__all__ = ["EXPERIMENTS"]
