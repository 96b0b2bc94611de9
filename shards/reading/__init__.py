"""Packed shards back to arrays and batches: what is read, in which order, and checked."""
