"""A local web page that shows the patches, tokens, time and predictions of a model on an image.

`DemoModel` computes what the page shows and works without it; `aptvit.demo.page` builds the page and needs gradio.

May import `aptvit.training`, `aptvit.report` and all below them.
"""

from aptvit.demo.demo_model import DemoModel, PatchView, Predictions, Settings

__all__ = ["DemoModel", "PatchView", "Predictions", "Settings"]
