"""Pruned models in engines and formats of other projects, one module each."""
