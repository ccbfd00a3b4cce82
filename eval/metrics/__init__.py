"""Metrics: functions over plain data. They know text, numbers and formulas; nothing of models, shards or files.

All are pure but those of `java.py`, which runs other people's programs.
"""
