"""Makes torchvision importable beside a PyTorch build that its compiled operators do not fit (a CPU wheel, for one).

Without them `import torchvision` stops at `torchvision::nms`, which no classifier uses. Declaring it is enough.
"""

import sys

import torch

_library: torch.library.Library | None = None  # the declarations live as long as this object


def ensure_torchvision() -> None:
    """Import torchvision; where its compiled operators are missing, declare those its import asks for and try again."""
    global _library
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if _library is not None or "operator torchvision::nms does not exist" not in str(error):
            raise
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
        import torchvision  # noqa: F401
