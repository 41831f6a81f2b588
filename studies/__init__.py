"""Scripts behind figures and tables in ``docs/``; see ``README.md`` in this folder. They are in no wheel."""
