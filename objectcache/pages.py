"""vLLM's KV tensors as opaque pages: which bytes belong to block b of layer l. Not what is in them."""

from typing import TYPE_CHECKING

import torch

from objectcache.identity import canonical_layers
from objectcache.support import layer_specs

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


def layer_pages(
    kv_cache_config: "KVCacheConfig", kv_caches: dict[str, torch.Tensor]
) -> tuple[list[str], list[torch.Tensor]]:
    """Layer names in object order, and for each its pages as uint8 [blocks, page_bytes].

    The views share vLLM's memory. Padding at the end of a page is left out.
    """
    from vllm.v1.kv_cache_interface import group_kernel_blocks

    group = kv_cache_config.transfer_groups[0]
    specs = layer_specs(group.kv_cache_spec, group.layer_names)
    names = canonical_layers(group.layer_names)
    pages = []
    for name in names:
        # The kernel's blocks may be smaller than those of the block table.
        blocks = group_kernel_blocks(kv_caches[name], kv_cache_config.num_blocks)
        size = blocks.element_size()
        pages.append(
            torch.tensor([], dtype=torch.uint8, device=blocks.device).set_(
                blocks.untyped_storage(),
                blocks.storage_offset() * size,
                (kv_cache_config.num_blocks, specs[name].unpadded_page_size_bytes),
                (blocks.stride(0) * size, 1),
            )
        )
    return names, pages
