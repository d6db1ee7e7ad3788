"""A local page to play with: what is here runs without it, the page itself needs gradio.

May import `aptvit.training`, `aptvit.report` and all below them.
"""

from aptvit.demo.player import Answers, Look, Player, Settings

__all__ = ["Answers", "Look", "Player", "Settings"]
