"""Processes and devices: the accelerator, FSDP2, synchronised BatchNorm, failures. Imports only from common and settings."""
