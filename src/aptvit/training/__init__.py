"""Fine-tuning: recipes, and the loop that runs them on accelerate.

May import `aptvit.report` and all below it.
"""

from aptvit.files.sources import find_sources, hold_back, photos
from aptvit.training.recipe import RECIPES, Recipe, load_recipe
from aptvit.training.trainer import Training

__all__ = ["RECIPES", "Recipe", "Training", "find_sources", "hold_back", "load_recipe", "photos"]
