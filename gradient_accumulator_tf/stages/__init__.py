"""What looks across the examples of an effective batch, in stages over its micro-batches."""
