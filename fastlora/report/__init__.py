"""Reports about a model: its layers, its memory, whether its adapters work."""
