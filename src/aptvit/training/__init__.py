"""Fine-tuning: recipes, and the loop that runs them on accelerate."""

from aptvit.training.recipe import RECIPES, Recipe, load_recipe
from aptvit.training.sources import find_sources, hold_back, photos

__all__ = ["RECIPES", "Recipe", "find_sources", "hold_back", "load_recipe", "photos"]
