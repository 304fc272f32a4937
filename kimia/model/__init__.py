"""The Kimi-Audio networks in plain PyTorch: tensors in, tensors out. No wire code, no environment."""
