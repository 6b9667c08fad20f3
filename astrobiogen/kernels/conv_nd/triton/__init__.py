"""The Triton kernels of the convolution and their launchers; `triton_kernels` registers them."""
