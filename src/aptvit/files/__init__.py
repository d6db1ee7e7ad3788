"""Images, clips, labels and lists from disk: what is read and what is an error; knows no model.

May import `aptvit.measuring` and, for transforms and names of classes, `timm.data`.
"""
