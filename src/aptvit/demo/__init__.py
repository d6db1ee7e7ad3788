"""A local web page that shows the patches, tokens, time and predictions of a model on an image.

`demo_model` computes what the page shows, `page` builds it with gradio, and `server` serves it: behind `guard`, which
checks requests by `access`, and from a folder of `uploads`.

May import `aptvit.training`, `aptvit.report` and all below them.
"""
