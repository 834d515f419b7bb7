"""Uses of a trained model: evaluation, prediction, export, upload, demo, mistakes. Imports training/ and lower rooms."""
