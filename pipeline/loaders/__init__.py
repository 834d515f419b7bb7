"""(images, labels) batches of an epoch, from device memory, worker processes or a stream. Imports data, distributed and below."""
