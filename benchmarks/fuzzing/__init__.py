"""Hostile files: small valid ones of every format (`seeds`), changed (`mutations`), and opened within limits (`limits`)."""
