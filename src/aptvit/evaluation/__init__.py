"""Accuracy against measured time, tokens and operations, of adaptive patches and baselines.

record = run_evaluation(Path("images"), load, "vit_tiny_patch16_224", parse_methods(["apt-entropy", "tome"], [0.67]))

May import `aptvit.training`, `aptvit.report` and all below them.
"""
