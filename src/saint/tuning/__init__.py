"""Plans found for a model and its images: what leaving costs, what work it saves, and the best trade of the two."""

from .run import Tuning, tune, tune_all

__all__ = ["Tuning", "tune", "tune_all"]
