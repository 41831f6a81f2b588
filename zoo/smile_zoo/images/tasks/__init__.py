"""Class names and prompt templates of the tasks, one module each, for the zero-shot head of the framework."""
