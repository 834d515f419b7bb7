"""A training run: built from settings, trained step by step, evaluated, logged and finished. It imports every room below."""
