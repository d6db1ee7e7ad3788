"""Parts of an adaptive transformer that know no host: embeddings, packed attention, CUDA graphs.

May import `aptvit.patching`.
"""
