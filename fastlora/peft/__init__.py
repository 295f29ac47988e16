"""The fused forward pass for PEFT models, and PEFT's folder format."""
