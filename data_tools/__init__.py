"""Data tools: make, convert and inspect shards."""
