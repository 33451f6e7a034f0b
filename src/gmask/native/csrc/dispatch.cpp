// Which instruction sets do this build and this machine have?
#include "api.h"
#include "kernels.h"

#ifdef GMASK_X86
#include <cpuid.h>
#endif
#ifdef GMASK_ARM_INTEGERS
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace gmask {
namespace {

#ifdef GMASK_X86
// CPUID, leaf 7.1: not every compiler's __builtin_cpu_supports knows these.
bool has_feature(int bit) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> bit & 1) != 0;
}

bool has_avx_vnni() { return has_feature(4); }
bool has_avx512_bf16() { return has_feature(5); }
#endif

#ifdef GMASK_ARM_INTEGERS
#if defined(__linux__)
// The bits of Linux's asm/hwcap.h, HWCAP_ASIMDDP and HWCAP2_I8MM, which older headers lack.
bool has_dotprod() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }
bool has_i8mm() { return (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }
#elif defined(__APPLE__)
bool has_feature(const char* name) {
  int found = 0;
  size_t size = sizeof found;
  return sysctlbyname(name, &found, &size, nullptr, 0) == 0 && found != 0;
}

bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif
#endif

bool is_supported(int isa) {
  switch (isa) {
    case kPortable:
      return true;
#ifdef GMASK_ARM
    case kNeon:
      return true;
#endif
#ifdef GMASK_ARM_INTEGERS
    case kNeonDotprod:
    case kNeonI8mm:
      return has_dotprod() && (isa == kNeonDotprod || has_i8mm());
#endif
#ifdef GMASK_X86
    case kAvx2:
    case kAvx2Int8:
    case kAvxVnni:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (isa != kAvxVnni || has_avx_vnni());
    case kAvx512:
    case kAvx512Vnni:
#ifdef GMASK_BF16
    case kAvx512Bf16:
#endif
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             (isa == kAvx512 || __builtin_cpu_supports("avx512vnni")) && (isa != kAvx512Bf16 || has_avx512_bf16());
#endif
    default:
      return false;
  }
}

}  // namespace

const Kernels* find_kernels(int isa, [[maybe_unused]] Type type) {
  if (!is_supported(isa)) return nullptr;
#ifdef GMASK_BF16
  if (isa == kAvx512Bf16) return type == kBfloat16 ? &avx512_bf16_kernels() : &avx512_kernels();
#endif
#ifdef GMASK_X86
  if (isa == kAvx512Vnni) return type == kBfloat16 ? &avx512_vnni_kernels() : &avx512_kernels();
  if (isa == kAvx512) return &avx512_kernels();
  if (isa == kAvxVnni && type == kBfloat16) return &avx_vnni_kernels();
  if (isa == kAvx2Int8 && type == kBfloat16) return &avx2_int8_kernels();
  if (isa == kAvx2 || isa == kAvx2Int8 || isa == kAvxVnni) return &avx2_kernels();
#endif
#ifdef GMASK_ARM_INTEGERS
  if (isa == kNeonI8mm && type == kBfloat16) return &neon_i8mm_kernels();
  if (isa == kNeonDotprod && type == kBfloat16) return &neon_dotprod_kernels();
#endif
#ifdef GMASK_ARM
  if (isa == kNeon || isa == kNeonDotprod || isa == kNeonI8mm) return &neon_kernels();
#endif
  return &portable_kernels();
}

}  // namespace gmask

// A bit for each instruction set (kernels.h: Isa).
GMASK_API int gmask_instruction_sets(void) {
  int sets = 0;
  for (int isa = 0; isa < gmask::kIsaCount; ++isa) sets |= gmask::is_supported(isa) << isa;
  return sets;
}
