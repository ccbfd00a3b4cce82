"""Training: reads a config, builds or loads a model, moves data through it under DeepSpeed, leaves model and log."""
