"""What a trained model does: evaluate, predict, export, upload, show its mistakes. It imports training and below."""
