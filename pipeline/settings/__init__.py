"""The settings of a run and how a command line or YAML file becomes them. It imports common only."""
