"""Recipe of the text benchmark: packages → texts → heads → fine-tuning → exported files.

``python -m recipes.text FOLDER`` runs it.
"""
