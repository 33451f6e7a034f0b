// Published weights to the blocks that the kernels read.
#include "api.h"
#include "kernels.h"
#include "threads.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gmask {
namespace {

constexpr int kWords = 16;  // of a row at a time: a cache line

// Two's complement, the first of two columns in the high nibble, to the order of kernels.h.
uint32_t to_nibbles(uint32_t word) {
  word ^= 0x88888888;  // + 8
  return (word >> 4 & 0x0000000f) | (word >> 16 & 0x000000f0) | (word << 8 & 0x00000f00) | (word >> 4 & 0x0000f000) |
         (word << 4 & 0x000f0000) | (word >> 8 & 0x00f00000) | (word << 16 & 0x0f000000) | (word << 4 & 0xf0000000);
}

template <int BITS>
void pack_block(const uint8_t* published, uint32_t* block, int64_t rows, int64_t words) {
  for (int64_t start = 0; start < words; start += kWords) {
    const int64_t count = std::min<int64_t>(kWords, words - start);
    uint32_t part[kRows][kWords] = {};
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(part[row], published + (row * words + start) * 4, size_t(count) * 4);
    }
    if (BITS == 4) {
      for (auto& row : part)
        for (uint32_t& word : row) word = to_nibbles(word);
    }
    for (int64_t word = 0; word < count; ++word)
      for (int row = 0; row < kRows; ++row) block[(start + word) * kRows + row] = part[row][word];
  }
}

// Asks for pages of 2 MB, before the memory is touched: fewer of them to fill, and to look up at each token.
void ask_for_large_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may be refused
#endif
}

}  // namespace
}  // namespace gmask

GMASK_API int gmask_pack(int bits, const void* published, void* blocks, int64_t rows, int64_t width, int threads) {
  using namespace gmask;
  if ((bits != 4 && bits != 8) || rows < 0 || width < 0 || width % 4 != 0) return 1;
  const int64_t words = width / 4;
  ask_for_large_pages(blocks, (rows + kRows - 1) / kRows * kRows * width);
  share_each((rows + kRows - 1) / kRows, threads, [&](int64_t index) {
    const uint8_t* from = static_cast<const uint8_t*>(published) + index * kRows * width;
    uint32_t* to = static_cast<uint32_t*>(blocks) + index * kRows * words;
    const int64_t left = std::min<int64_t>(kRows, rows - index * kRows);
    bits == 4 ? pack_block<4>(from, to, left, words) : pack_block<8>(from, to, left, words);
  });
  return 0;
}
