"""Recipe of the image benchmark: packages → images → pretraining → fine-tuning → exported files.

``python -m recipes.images FOLDER`` runs it.
"""
