"""Memory between pages that nobody may touch: a read or write beyond a tensor ends the process, and is seen."""

import ctypes
import mmap

import torch

from astrobiogen.testing.fuzzing.mutations import extent_of, inside_storage

PAGE = mmap.PAGESIZE
NO_ACCESS = 0


class Arena:
    """`slots` places of `size` bytes, each between two forbidden pages. A place is used again after `clear`.

    Raises:
        OSError: the system refuses to protect a page.
    """

    def __init__(self, slots: int = 24, size: int = 1 << 20) -> None:
        self.slots, self.size = slots, size
        self.step = size + PAGE
        self.memory = mmap.mmap(-1, slots * self.step + PAGE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for slot in range(slots + 1):
            if libc.mprotect(self.base + slot * self.step, PAGE, NO_ACCESS):
                raise OSError(ctypes.get_errno(), "mprotect refused to close a page")
        self.used = 0

    def clear(self) -> None:
        """Forget what was placed."""
        self.used = 0

    def place(self, tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
        """A copy of `tensor`, strides kept, that ends at a forbidden page, or starts behind one; `tensor` itself where
        it is no plain dense memory, or too large."""
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_neg() or tensor.is_conj() or tensor.numel() == 0 or self.used == self.slots:
            return tensor
        extent = extent_of(tensor)
        count = extent * tensor.element_size()
        if count > self.size or not inside_storage(tensor):
            return tensor
        start = self.base + self.used * self.step + PAGE + (self.size - count if at_end else 0)
        self.used += 1
        region = (ctypes.c_char * count).from_address(start)
        flat = torch.frombuffer(region, dtype=torch.uint8).view(tensor.dtype)
        flat.copy_(tensor.detach().as_strided((extent,), (1,), tensor.storage_offset()))
        return flat.as_strided(tensor.shape, tensor.stride()).requires_grad_(tensor.requires_grad)
