"""Training with few bits: fake quantization, learned steps, and what turns the result into packed leaves."""

from jq4.divergence import divergence as divergence
from jq4.train.begin import move_to_codes as move_to_codes
from jq4.train.begin import quantizers as quantizers
from jq4.train.fake import FakeQuantized as FakeQuantized
from jq4.train.fake import fake_quantized as fake_quantized
from jq4.train.harden import harden as harden
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
from jq4.train.teacher_cache import TeacherCache as TeacherCache
from jq4.train.teacher_cache import digest_of_tree as digest_of_tree
