"""Image sets: a name, a folder or a Hub id becomes train, val and test splits. It imports common, images, models and settings."""
