"""Processes and devices: the accelerator, FSDP2, synchronized BatchNorm, failures. Imports only from common and settings."""
