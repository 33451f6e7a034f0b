"""Corpora: documents read, filtered and compared with each other, and their tokens in memory-mapped shards."""
