"""Networks that map images to features, for metrics that compare sets of them (`metrics`).

`inception_v3` gives those of the FID. The weights are read from published files, without PyTorch.
"""

from .efficientnet import EfficientNetLite0, efficientnet_lite0
from .inception import InceptionV3, inception_v3

__all__ = ["EfficientNetLite0", "InceptionV3", "efficientnet_lite0", "inception_v3"]
