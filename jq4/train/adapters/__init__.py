"""Low-rank adapters beside packed or dense weights: LoRA, QLoRA, LoftQ."""
