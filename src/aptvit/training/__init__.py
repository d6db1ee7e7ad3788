"""Fine-tuning: recipes, and the loop that runs them on accelerate."""

from aptvit.training.recipe import RECIPES, Recipe, load_recipe
from aptvit.training.sources import find_sources, hold_back, photos
from aptvit.training.trainer import Training

__all__ = ["RECIPES", "Recipe", "Training", "find_sources", "hold_back", "load_recipe", "photos"]
