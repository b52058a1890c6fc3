"""The memory of the ring: where slots lie, pinned or not, seen by one process or by several. Not who holds which slot: see ring.py; not what is copied: see device.py."""

import mmap
import os

import torch

from objectcache.ring import PROGRESS_BYTES, progress_offset


class HostSlots:
    """The memory of the ring: `slots` rows of `slot_bytes`, pinned if a GPU copies from it.

    Behind them is `progress`, for each slot how many leading layers of what is read there may be used.
    With `shared` another process can map it, by `descriptor`. Raises OSError if there is no such memory.
    `close` ends what others see of it, and the pinning; the bytes go with the last who looks at them.
    """

    def __init__(self, slots: int, slot_bytes: int, pinned: bool, shared: bool = False) -> None:
        self.descriptor: int | None = None
        self._registered = 0  # address
        behind = progress_offset(slots, slot_bytes)
        size = behind + slots * PROGRESS_BYTES
        if shared:
            memory = self._shared(size, pinned)
        else:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.tensor = memory[: slots * slot_bytes].view(slots, slot_bytes)
        self.progress = memory[behind:].view(torch.uint16).numpy()
        self.progress[:] = 0
        self._views = [memoryview(row) for row in self.tensor.numpy()]

    def _shared(self, size: int, pinned: bool) -> torch.Tensor:
        # Not in /dev/shm, which is small in many containers.
        self.descriptor = os.memfd_create("objectcache-ring")
        try:
            os.ftruncate(self.descriptor, size)
            memory = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)
            if pinned:
                code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)
                if int(code) != 0:
                    raise OSError(f"CUDA does not pin shared memory (error {int(code)})")
                self._registered = memory.data_ptr()
        except OSError:
            self.close()
            raise
        return memory

    def close(self) -> None:
        """Nothing copies any more, and no other process will be told of it. Idempotent."""
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered)
            self._registered = 0
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def view(self, slot: int) -> memoryview:
        """The bytes of one slot, writable."""
        return self._views[slot]
