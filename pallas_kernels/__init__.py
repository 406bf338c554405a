"""Packed-integer kernels for JAX: arrays in, arrays out."""
