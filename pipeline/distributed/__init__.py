"""Processes and devices: the accelerator, FSDP2, synchronised BatchNorm, failures shared by ranks. It imports common and settings."""
