// The checksum of a block: CRC32C (Castagnoli), as iSCSI and ext4 use it.
// Apart from checksums.h, so that programs without a data path need not link ISA-L.
#pragma once

#include <cstddef>
#include <cstdint>

namespace varve::cow {

/// Of kBlockBytes bytes. Any thread; 0.1 us if they are in the processor's cache.
uint32_t BlockSum(const std::byte* block);

}  // namespace varve::cow
