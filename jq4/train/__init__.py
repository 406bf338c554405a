"""Training with few bits: fake quantization, learned steps, and what turns the result into packed leaves."""

from jq4.divergence import divergence as divergence
from jq4.train.adapter import Adapter as Adapter
from jq4.train.adapter import Adapters as Adapters
from jq4.train.begin import move_to_codes as move_to_codes
from jq4.train.begin import quantizers as quantizers
from jq4.train.fake import FakeQuantized as FakeQuantized
from jq4.train.fake import fake_quantized as fake_quantized
from jq4.train.harden import harden as harden
from jq4.train.lora import lora as lora
from jq4.train.merge_lora import MergedLeaf as MergedLeaf
from jq4.train.merge_lora import merge_lora as merge_lora
from jq4.train.quantizer import Quantizer as Quantizer
from jq4.train.quantizer import Quantizers as Quantizers
from jq4.train.record import RoundingRecord as RoundingRecord
from jq4.train.record import UnroundedError as UnroundedError
from jq4.train.record import UnroundedWarning as UnroundedWarning
from jq4.train.stages import Stage as Stage
from jq4.train.stages import stages as stages
from jq4.train.teacher import Likeliest as Likeliest
from jq4.train.teacher import divergence_from as divergence_from
from jq4.train.teacher import likeliest as likeliest
from jq4.train.with_lora import IdleAdapterWarning as IdleAdapterWarning
from jq4.train.with_lora import WithLora as WithLora
from jq4.train.with_lora import with_lora as with_lora
