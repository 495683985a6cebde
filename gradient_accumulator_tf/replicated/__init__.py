"""`tf.distribute` for one replica and for many: sums, conditionals, variables."""
