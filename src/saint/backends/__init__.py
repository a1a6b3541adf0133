"""Pruned models outside of PyTorch's eager mode."""
