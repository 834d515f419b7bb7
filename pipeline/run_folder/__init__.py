"""The folder of a run: checkpoints, resuming, the lock, names and paths. Imports only from common and settings."""
