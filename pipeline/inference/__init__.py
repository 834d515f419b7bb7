"""Uses of a trained model: evaluation, prediction, export, upload, its mistakes. Imports training/ and lower rooms."""
