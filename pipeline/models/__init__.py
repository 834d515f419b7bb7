"""Models: timm's, small ones of this project, small stems, timm folders, the fit of a classifier. Imports only from common."""
