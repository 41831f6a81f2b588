"""Recipe of the language benchmark: packages → prompts and answers → fine-tuning → exported files.

``python -m recipes.smollm2 FOLDER`` runs it.
"""
