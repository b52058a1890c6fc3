"""vLLM's KV tensors as opaque pages: which bytes belong to block b of layer l. Not what is in them."""

import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


def natural_order(names: list[str]) -> list[str]:
    """Layer 2 before layer 10: the order of layers in an object."""
    return sorted(
        names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]
    )


def layer_pages(
    kv_cache_config: "KVCacheConfig", kv_caches: dict[str, torch.Tensor]
) -> tuple[list[str], list[torch.Tensor]]:
    """Layer names in object order, and for each its pages as uint8 [blocks, page_bytes].

    The views share vLLM's memory. Padding at the end of a page is left out.
    """
    from vllm.v1.kv_cache_interface import group_kernel_blocks

    group = kv_cache_config.transfer_groups[0]
    specs = getattr(group.kv_cache_spec, "kv_cache_specs", {})
    names = natural_order(list(group.layer_names))
    pages = []
    for name in names:
        spec = specs.get(name, group.kv_cache_spec)
        # The kernel's blocks may be smaller than those of the block table.
        blocks = group_kernel_blocks(kv_caches[name], kv_cache_config.num_blocks)
        size = blocks.element_size()
        pages.append(
            torch.tensor([], dtype=torch.uint8, device=blocks.device).set_(
                blocks.untyped_storage(),
                blocks.storage_offset() * size,
                (kv_cache_config.num_blocks, spec.unpadded_page_size_bytes),
                (blocks.stride(0) * size, 1),
            )
        )
    return names, pages
