"""The steps of a recipe that run before its rules: they change dense weights and leave their function as it is.

    rotate        the residual stream and the value heads in another basis: no outliers    jq4.equalize.rotate
    smoothquant   outliers of activations moved to the weights                             jq4.equalize.smoothquant
    awq           inputs scaled so that rounding hurts the outputs least                   jq4.equalize.awq

What can be scaled and rotated, a model says by its Folds (jq4.equalize.folds).
"""

from jq4.equalize.folds import Fold as Fold
from jq4.equalize.folds import Folds as Folds
from jq4.equalize.folds import Residual as Residual
from jq4.equalize.steps import collects as collects
from jq4.equalize.steps import for_model as for_model
from jq4.equalize.steps import prepare_tree as prepare_tree
from jq4.equalize.steps import rotate_block as rotate_block
from jq4.equalize.steps import rotate_outside as rotate_outside
from jq4.equalize.steps import scale_block as scale_block
