"""INT4 as a first-class citizen of JAX: quantize any model's weights, keep them packed from disk to matmul.

recipe  = jq4.Recipe.preset("hqq-w4g64-asym")
qparams = jq4.quantize(params, recipe)                        # params -> params, QArray leaves; pure
logits  = jax.jit(jq4.quantized(model.apply))({"params": qparams}, tokens)
jq4.save("model.jq4", qparams)                                # packed Orbax, self-describing, versioned
qparams = jq4.restore("model.jq4")
"""

from jq4.apply import Quantized as Quantized
from jq4.apply import explain as explain
from jq4.apply import quantized as quantized
from jq4.axes import contraction_axes as contraction_axes
from jq4.chain import Chain as Chain
from jq4.chain import TreeSource as TreeSource
from jq4.checkpoint import read_manifest as read_manifest
from jq4.checkpoint import restore as restore
from jq4.checkpoint import save as save
from jq4.checkpoint import verify as verify
from jq4.choose_formats import choose_formats as choose_formats
from jq4.drift import Drift as Drift
from jq4.drift import drift as drift
from jq4.driver import BlocksResult as BlocksResult
from jq4.driver import quantize_blocks as quantize_blocks
from jq4.errors import CheckpointError as CheckpointError
from jq4.errors import DensifiedError as DensifiedError
from jq4.errors import JQ4Error as JQ4Error
from jq4.formats import FORMATS as FORMATS
from jq4.formats import Format as Format
from jq4.layouts import prepare as prepare
from jq4.matmul import matmul as matmul
from jq4.observe import observe as observe
from jq4.observe_pair import observe_pair as observe_pair
from jq4.qarray import QArray as QArray
from jq4.quality_report import compose_report as compose_report
from jq4.quality_report import write_report as write_report
from jq4.quantize import CalibrationWarning as CalibrationWarning
from jq4.quantize import IdleRuleWarning as IdleRuleWarning
from jq4.quantize import dequantize as dequantize
from jq4.quantize import quantize as quantize
from jq4.quantize import quantize_report as quantize_report
from jq4.quantize_report import QuantizeReport as QuantizeReport
from jq4.recipe import Recipe as Recipe
from jq4.record import DensifiedWarning as DensifiedWarning
from jq4.record import Record as Record
from jq4.rounding import quantize_weight as quantize_weight
from jq4.rule import Rule as Rule
from jq4.sensitivity import Sensitivity as Sensitivity
from jq4.sensitivity import sensitivity as sensitivity
from jq4.shardings import shardings_of as shardings_of
from jq4.statistics import Statistics as Statistics
from jq4.statistics import WeightStatistics as WeightStatistics
from jq4.train import Adapters as Adapters
from jq4.train import IdleAdapterWarning as IdleAdapterWarning
from jq4.train import Quantizers as Quantizers
from jq4.train import UnroundedError as UnroundedError
from jq4.train import UnroundedWarning as UnroundedWarning
from jq4.train import fake_quantized as fake_quantized
from jq4.train import harden as harden
from jq4.train import loftq as loftq
from jq4.train import lora as lora
from jq4.train import merge_lora as merge_lora
from jq4.train import move_to_codes as move_to_codes
from jq4.train import quantizers as quantizers
from jq4.train import restore_lora as restore_lora
from jq4.train import save_lora as save_lora
from jq4.train import with_lora as with_lora

__version__ = "0.1.0"
