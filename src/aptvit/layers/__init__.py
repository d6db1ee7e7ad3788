"""Parts of an adaptive transformer that are independent of the host: embeddings, packed attention, CUDA graphs.

May import `aptvit.patching`.
"""
