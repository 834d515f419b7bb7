"""Processes and devices: the accelerator, FSDP2, synchronised BatchNorm, shared failures. It imports settings and common."""
