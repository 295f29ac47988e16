"""What a user is told about a model: which layers, how much memory, whether the adapters work."""
