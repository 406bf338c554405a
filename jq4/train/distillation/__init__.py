"""What a model in training is held to: a teacher's predictions, now or from disk, and its hidden states."""
