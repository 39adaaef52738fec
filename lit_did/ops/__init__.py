"""The operators: statistics of a policy and its reference, a token and a sequence at a time."""

from lit_did.ops.linear import linear_sequence_statistics, linear_token_statistics
from lit_did.ops.sequence_statistics import sequence_reduction, sequence_statistics
from lit_did.ops.statistics import SequenceStatistics, TokenStatistics
from lit_did.ops.token_statistics import token_statistics

__all__ = [
    "SequenceStatistics",
    "TokenStatistics",
    "linear_sequence_statistics",
    "linear_token_statistics",
    "sequence_reduction",
    "sequence_statistics",
    "token_statistics",
]
