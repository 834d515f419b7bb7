"""The folder of a run: checkpoints, where a run resumes, the lock, names and paths. It imports common and settings."""
