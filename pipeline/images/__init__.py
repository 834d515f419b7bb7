"""Encoded images become model input: decode, fit on the CPU, augment on the device. Imports only from common."""
