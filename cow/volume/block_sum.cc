#include "cow/volume/block_sum.h"

#include <isa-l/crc.h>

#include "cow/format/types.h"

namespace varve::cow {

uint32_t BlockSum(const std::byte* block) {
    auto* data = reinterpret_cast<unsigned char*>(const_cast<std::byte*>(block));
    return ~crc32_iscsi(data, static_cast<int>(kBlockBytes), ~0U);
}

}  // namespace varve::cow
