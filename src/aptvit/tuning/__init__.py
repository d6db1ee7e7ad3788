"""The best setting for a target, result on a user's own images: adaptive patches, a smaller image, ToMe, or nothing.

search = Search(load, "vit_tiny_patch16_224", images, Target("time", 0.6)); result = search.run()

May import `aptvit.evaluation` and all below it.
"""
