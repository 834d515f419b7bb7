"""Other trainers for comparison: their loops, loaders and start-up, with the same images and model."""
