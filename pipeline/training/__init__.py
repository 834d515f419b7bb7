"""A training run: built from the settings, trained step by step, evaluated, logged and finished. Imports all lower rooms."""
