"""A folder for each family of models, and what reads their checkpoints."""
