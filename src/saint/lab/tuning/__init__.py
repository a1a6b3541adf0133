"""Plans found for a model and its images: what leaving costs, what work it saves, and the best trade of the two."""

from .run import Target, Tuning, forwards, search, tune

__all__ = ["Target", "Tuning", "forwards", "search", "tune"]
