"""Learned rounding and scales: a block at a time against the dense block, or end to end against the dense model."""

from jq4.tuning.block import tune_block as tune_block
from jq4.tuning.chain_logits import logits_of_chain as logits_of_chain
from jq4.tuning.distill import distill as distill
from jq4.tuning.effort import EFFORTS as EFFORTS
from jq4.tuning.effort import with_effort as with_effort
