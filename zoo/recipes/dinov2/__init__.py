"""Recipe of the DINOv2 benchmark: packages → images → linear probes → fine-tuning → exported files.

``python -m recipes.dinov2 FOLDER`` runs it.
"""
