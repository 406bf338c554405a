"""Decoder-only language models in plain Flax, read from Hugging Face folders. They know nothing of quantization."""

from models.config import DecoderConfig as DecoderConfig
from models.decoder import Decoder as Decoder
from models.kv_cache import KVCache as KVCache
from models.kv_cache import empty_cache as empty_cache
