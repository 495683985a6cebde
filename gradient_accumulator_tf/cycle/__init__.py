"""One cycle of accumulation: gradients and their sums, losses, micro-batches, policies."""
