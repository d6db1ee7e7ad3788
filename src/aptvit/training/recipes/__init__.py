"""What a training depends on besides model and data: a class for each task, and a YAML file for each published recipe.

Knows no task: `aptvit.training.tasks` reads these classes. May import nothing else of the package.
"""
