"""Training data: records, where they come from, how they become batches. Importing this loads nothing; import the module you need."""
