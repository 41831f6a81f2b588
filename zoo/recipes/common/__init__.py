"""Helpers of all recipes: command line, package downloads, adapters."""
