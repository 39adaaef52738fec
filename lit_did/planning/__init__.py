"""What training will take: the peak memory of a GPU in a step of LitDPO, worked out without one."""

from lit_did.planning.advice import CARDS, Switch, fits, switches
from lit_did.planning.counting import HOLDERS
from lit_did.planning.models import known_shapes, read_config
from lit_did.planning.running import Plan, plan, plan_of
from lit_did.planning.settings import Run

__all__ = [
    "CARDS",
    "HOLDERS",
    "Plan",
    "Run",
    "Switch",
    "fits",
    "known_shapes",
    "plan",
    "plan_of",
    "read_config",
    "switches",
]
