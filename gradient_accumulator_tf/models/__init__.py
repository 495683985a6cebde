"""The model that accumulates in `train_step`, and its callbacks."""
