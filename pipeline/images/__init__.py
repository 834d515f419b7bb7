"""From an encoded image to a batch of model input: decode, fit on the CPU, augment on the device. It imports common only."""
