"""Reports about a model: its layers, its memory, and whether its adapters work."""
