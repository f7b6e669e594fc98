"""The flags of a training run: published ones, those of TrainingArguments, recipes."""
