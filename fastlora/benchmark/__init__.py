"""The command `fastlora bench`: time LoRA layers on this machine; `benchmarks/` uses the same code."""
