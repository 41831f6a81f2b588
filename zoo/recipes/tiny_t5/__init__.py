"""Recipe of the tiny T5: packages → sentences → vocabulary → pretraining → fine-tuning → exported files.

``python -m recipes.tiny_t5 FOLDER`` runs it.
"""
