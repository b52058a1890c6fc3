"""The memory of the ring: where slots lie, pinned or not, seen by one process or by several. Not who holds which slot: see ring.py; not what is copied: see device.py."""

import mmap
import os
import weakref

import torch

from objectcache.ring import NOT_BEGUN, PROGRESS_BYTES, progress_offset


class HostSlots:
    """The memory of the ring: `slots` rows of `slot_bytes`, pinned if a GPU copies from it.

    Behind them is `progress`, for each slot how many leading layers of what is read there may be used, and
    NOT_BEGUN before its header is verified, or FAILED.
    With `shared` another process can map it, by `descriptor`. Raises OSError if there is no such memory.
    `close` ends what others see of it, and the pinning; the bytes go with the last who looks at them.
    """

    def __init__(self, slots: int, slot_bytes: int, pinned: bool, shared: bool = False) -> None:
        self.descriptor: int | None = None
        self._unpin: weakref.finalize[[torch.Tensor], HostSlots] | None = None
        behind = progress_offset(slots, slot_bytes)
        size = behind + slots * PROGRESS_BYTES
        if shared:
            memory = self._shared(size, pinned)
        else:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.tensor = memory[: slots * slot_bytes].view(slots, slot_bytes)
        self.progress = memory[behind:].view(torch.int16).numpy()
        self.progress[:] = NOT_BEGUN
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
                # At the latest before the memory goes: another that came to lie at its address could not
                # be pinned then.
                self._unpin = weakref.finalize(self, _unpin, memory)
                self._unpin.atexit = False
        except OSError:
            self.close()
            raise
        return memory

    def close(self) -> None:
        """Nothing copies any more, and no other process will be told of it. Idempotent."""
        if self._unpin is not None:
            self._unpin()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def view(self, slot: int) -> memoryview:
        """The bytes of one slot, writable."""
        return self._views[slot]


def _unpin(memory: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
