"""Engines of other projects, one module each."""
