"""Recipes, the settings of a training: a class for each task, and a YAML file for each published recipe.

The tasks in `aptvit.training.tasks` read these classes. May import nothing else of the package.
"""
