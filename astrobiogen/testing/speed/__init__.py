"""A static model of the Triton kernels' speed: machine code, a launch and a machine in, a *predicted* time out."""
