"""One module per task: the class names, and the prompt templates that the framework's zero-shot head uses."""
