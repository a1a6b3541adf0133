"""Measuring: time, FLOPs, memory and agreement of base and pruned models, side by side in one process."""

from .agreement import Agreement as Agreement
from .agreement import agreement as agreement
from .encoder import EncoderBench as EncoderBench
from .encoder import bench_encoder as bench_encoder
from .timing import Spread as Spread
