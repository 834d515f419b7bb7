"""Models and their files: timm models, the small models of this project, timm folders. Imports only from common."""
