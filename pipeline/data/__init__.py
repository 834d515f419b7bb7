"""Image datasets: a name, a folder or a Hub id becomes splits. Imports only from common, images, models and settings."""
