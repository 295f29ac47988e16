"""Runs: configuration, data, trainer, checkpoints, several processes."""
