"""The baselines: other methods to run a pretrained ViT on fewer tokens, behind one protocol.

model = aptvit.merging.tome(timm.create_model("vit_base_patch16_224", pretrained=True), r=13)
logits = model(images)

Fewer tokens inside the blocks: `tome`, `evit`, `dtem`. Fewer tokens before the blocks: `random`, `downscale`,
`resize`, `pixelprune`.

May import `aptvit.api` and all below it.
"""

from aptvit.merging.adaptive import ReducedAdaptive
from aptvit.merging.blocks import Reduction, through_blocks
from aptvit.merging.downscale import downscale
from aptvit.merging.dtem import DTEM, dtem
from aptvit.merging.evit import EViT, evit
from aptvit.merging.fit import fit_dtem
from aptvit.merging.pixelprune import PrunedTransformer, pixelprune
from aptvit.merging.random import random
from aptvit.merging.reduced import ReducedFeatures, ReducedTransformer
from aptvit.merging.resize import resize
from aptvit.merging.tome import ToMe, parse_r, token_schedule, tome

__all__ = [
    "DTEM",
    "EViT",
    "PrunedTransformer",
    "ReducedAdaptive",
    "ReducedFeatures",
    "ReducedTransformer",
    "Reduction",
    "ToMe",
    "downscale",
    "dtem",
    "evit",
    "fit_dtem",
    "parse_r",
    "pixelprune",
    "random",
    "resize",
    "through_blocks",
    "token_schedule",
    "tome",
]
