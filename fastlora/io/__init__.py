"""Adapters and base models on disk: state dicts, adapter files, export."""
