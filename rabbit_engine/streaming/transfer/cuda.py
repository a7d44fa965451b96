"""What only CUDA (and ROCm, under its name) offers: page-locking existing host memory."""

from __future__ import annotations

import torch

from rabbit_engine.streaming.transfer.accelerator import TorchAccelerator


class CudaAccelerator(TorchAccelerator):
    """A CUDA device."""

    def pin(self, memory: torch.Tensor) -> None:
        """Page-lock exactly these bytes: torch's own pinned allocator rounds up to powers of two."""
        if memory.numel():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo `pin`."""
        if memory.numel():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))
