"""The machine: one program of PTX on the threads of a grid of blocks, with global and shared memory."""
