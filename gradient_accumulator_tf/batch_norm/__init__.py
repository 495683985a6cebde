"""Batch normalisation whose moving statistics are the effective batch's."""
