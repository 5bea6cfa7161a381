"""Lets PyPI's torchvision, which is built for CUDA torch, be imported beside the CPU build of torch.

It imports (which open_clip and transformers need, and no more) once the operators that its import looks
for are declared.
"""

from importlib.util import find_spec

import torch

if find_spec("torchvision") and torch.version.cuda is None:
    _TORCHVISION = torch.library.Library("torchvision", "DEF")
    _TORCHVISION.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _TORCHVISION.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
