"""Evaluation: `run` asks a model, `score` judges a predictions file, `report` shows a run."""
