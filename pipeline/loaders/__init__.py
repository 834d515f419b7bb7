"""(images, labels) batches of an epoch, from device memory, workers or a stream. It imports data, distributed and below."""
