"""PEFT: its models on the fused path, and its folder format."""
