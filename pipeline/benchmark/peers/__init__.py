"""Other trainers beside ours: their loops, loaders and start, on the same images and model."""
