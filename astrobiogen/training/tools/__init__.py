"""Measurements beside the loop: memory, speed, learning rate, hardware."""
