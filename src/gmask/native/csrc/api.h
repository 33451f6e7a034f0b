// The C interface, which Python calls through ctypes.
#pragma once

#include <cstdint>

#ifdef _WIN32
#define GMASK_API extern "C" __declspec(dllexport)
#else
#define GMASK_API extern "C" __attribute__((visibility("default")))
#endif

GMASK_API int gmask_instruction_sets(void);

// y = x @ dequantized.T + bias. 0, or 1 for arguments that fit no kernel, 2 for too little memory.
// group: columns of a scale, `columns` for one a row.
GMASK_API int gmask_matmul(int isa, int bits, int x_type, int half_scale, const void* data, const void* scale,
                           const void* x, const void* bias, int bias_type, void* y, int64_t rows, int64_t outputs,
                           int64_t columns, int64_t group, int threads);

// y = x @ weight.T + bias, all of one type but the sums and maybe the bias, for a weight [outputs, columns]; columns: a
// multiple of 32. Returns as `gmask_matmul`.
GMASK_API int gmask_dense(int isa, int type, const void* weight, const void* x, const void* bias, int bias_type, void* y,
                          int64_t rows, int64_t outputs, int64_t columns, int threads);

// Published rows of `width` bytes (int8, or int4 with the first column in the high nibble; a multiple of 4) to blocks
// (kernels.h), the rows padded with zeros to 32.
GMASK_API int gmask_pack(int bits, const void* published, void* blocks, int64_t rows, int64_t width, int threads);

// One query a row and head. stored: the type of keys and values, that of the query, or int8 as `gmask_round` writes.
// strides: of the row and of the head of the query, then of the row, the head and the position of the keys, the same of
// the values, then of the row and the position of `visible`. Returns as `gmask_matmul`.
GMASK_API int gmask_attention(int isa, int type, int stored, const void* query, const void* keys, const void* values,
                              const void* visible, void* out, const int64_t* strides, int64_t batch, int64_t heads,
                              int64_t length, int64_t size, float scaling, int threads);

// x [batch, heads, length, size], its last axis dense, to a dense `out` of size + 4 bytes each: int8 numbers, and the
// float32 step that they are multiples of. strides: of the row, the head and the position of x. Returns as `gmask_matmul`.
GMASK_API int gmask_round(int isa, int type, const void* x, void* out, const int64_t* strides, int64_t batch,
                          int64_t heads, int64_t length, int64_t size, int threads);

// Of bfloat16 numbers that lie one after the other.
GMASK_API int gmask_gelu(int isa, const void* x, void* out, int64_t count, int threads);

// x [batch, heads, length, groups * 2 * half], its last axis dense, to a dense `out`. strides: of the row, the head and
// the position of x, then of the row and the position of the angles, whose [groups, 2 * half] are dense.
GMASK_API int gmask_rotate(int isa, int type, const void* x, const void* cosines, const void* sines, void* out,
                           const int64_t* strides, int64_t batch, int64_t heads, int64_t length, int64_t groups,
                           int64_t half, int threads);

// A quantized weight and its bias, as the arguments of `gmask_matmul` with these names.
struct GmaskLinear {
  const void *data, *scale, *bias;
  int64_t outputs, columns, group;
  int32_t bits, half_scale, bias_type;
};

// normed = layer normalization of x + alpha * residual; y = alpha * normed + down(gelu(up(normed))).
// All [rows, size] in bfloat16. room: for 2 * rows * (up.outputs + size) bfloat16 numbers. Returns as `gmask_matmul`.
GMASK_API int gmask_feed_forward(int isa, const GmaskLinear* up, const GmaskLinear* down, const void* norm_weight,
                                 const void* norm_bias, float epsilon, float alpha, const void* x,
                                 const void* residual, void* room, void* y, int64_t rows, int threads);
