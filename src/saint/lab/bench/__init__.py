"""Measuring: time, FLOPs, memory and agreement of base and pruned models, side by side in one process."""

from .agreement import Agreement as Agreement
from .agreement import agreement as agreement
from .encoder import EncoderBench as EncoderBench
from .encoder import bench_encoder as bench_encoder
from .generation import GenerationBench as GenerationBench
from .generation import bench_generation as bench_generation
from .timing import Spread as Spread
