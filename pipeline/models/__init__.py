"""Models and their files: timm's by name, our own small ones, timm folders. It imports common only."""
