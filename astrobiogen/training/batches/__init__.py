"""From samples to batches on the device, and what an update takes of them."""
