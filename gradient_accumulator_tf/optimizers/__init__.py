"""Optimizers around Keras optimizers, and what goes with them."""
