"""Metrics: pure functions over plain data. They know text, numbers and formulas; nothing of models, shards or files."""
