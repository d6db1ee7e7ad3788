"""A local page to play with: what is here runs without it, the page itself needs gradio."""

from aptvit.demo.player import Answers, Look, Player, Settings

__all__ = ["Answers", "Look", "Player", "Settings"]
