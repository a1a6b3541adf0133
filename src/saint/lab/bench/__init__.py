"""Measuring: time, FLOPs and memory of base and pruned models, side by side in one process."""

from .forward import ForwardBench as ForwardBench
from .forward import bench_forward as bench_forward
from .forward import count_pictures as count_pictures
from .generation import GenerationBench as GenerationBench
from .generation import bench_generation as bench_generation
from .timing import Spread as Spread
