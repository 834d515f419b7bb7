"""The settings of a run, parsed from a command line or YAML file. Imports only from common."""
