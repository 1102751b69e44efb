"""NPS Figs. 3 and 4: the published accuracy of a network, and who published it."""

import pandas as pd

from nbs_lib import paths
from nbs_lib.models import imagenet


def published(name: str, weights: str = "IMAGENET1K_V1") -> tuple[float, str]:
    """Top-1 in percent on ImageNet of torchvision's weights of `name` (as "ResNet18"), and who says so.

    It is in torchvision's metadata: nothing is downloaded. Where there are no such `weights`, those of the first recipe
    (V1). "": MobileNet-V1, which torchvision has no weights of, from NPS Table 2."""
    if not name:
        printed = pd.read_csv(paths.data_dir() / "paper" / "nps_tab02.csv").set_index("model")["top1_percent"]
        return float(printed["MobileNet-V1"]), "NPS Table 2"
    known = getattr(imagenet, f"{name}_Weights").__members__
    chosen = known.get(weights, known["IMAGENET1K_V1"])
    return chosen.meta["_metrics"]["ImageNet-1K"]["acc@1"], f"torchvision, {chosen}"
