// Enough of CUDA to run generated kernels on a CPU: thread blocks one after the other, their threads as fibers.
//
// A fiber gives way at __syncthreads and at a tensor core's step, which the warp's last thread computes for all.
// Products of float16 are exact in float32; sums are kept in double, where they are exact too, and rounded at the end of
// a step. Tensor cores round differently, so only sums that stay exact are the same there.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short

struct dim3 {
  int x = 1, y = 1, z = 1;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using std::max;
using std::min;

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

namespace emulator {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};
// A product of four warps: right operand from shared memory.
struct GroupStep {
  void* c[128];
  unsigned a[128][4], right;
  int arrived = 0;
  long generation = 0;
};
struct Step {
  void* c[32];
  unsigned a[32][4], b[32][2];
  int arrived = 0;
  long generation = 0;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Step> steps;
inline std::vector<GroupStep> group_steps;
inline char* shared = nullptr;
inline int current = 0, running = 0, at_barrier = 0;
inline long barrier = 0;
inline void (*body)(void**) = nullptr;
inline void** arguments = nullptr;

inline void Yield() { swapcontext(&fibers[current].context, &scheduler); }

inline float Half(unsigned bits) {
  int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24);
  return bits & 0x8000 ? -value : value;
}
inline float Half(const unsigned* words, int index) { return Half(words[index / 2] >> (16 * (index % 2)) & 0xFFFF); }

// Fragments of mma.m16n8k16, row by column: PTX ISA, "Matrix fragments for mma.m16n8k16".
inline void Compute(Step& step) {
  static float left[16][16], right[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    int group = lane / 4, place = lane % 4;
    for (int i = 0; i < 8; ++i) {
      int row = group + (i / 2 % 2 ? 8 : 0), k = place * 2 + i % 2 + (i >= 4 ? 8 : 0);
      left[row][k] = Half(step.a[lane], i);
    }
    for (int i = 0; i < 4; ++i) right[place * 2 + i % 2 + (i >= 2 ? 8 : 0)][group] = Half(step.b[lane], i);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
      float& total = static_cast<float*>(step.c[lane])[i];
      double sum = total;
      for (int k = 0; k < 16; ++k) sum += double(left[row][k]) * right[k][column];
      total = float(sum);
    }
  }
}

inline int Byte(const unsigned* words, int index, bool is_signed) {
  int byte = words[index / 4] >> (8 * (index % 4)) & 255;
  return is_signed ? static_cast<signed char>(byte) : byte;
}

// mma.m16n8k32 of integers: bytes lie where float16's halves do, four in a word.
inline void ComputeIntegers(Step& step, bool is_signed) {
  static int left[16][32], right[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    int group = lane / 4, place = lane % 4;
    for (int i = 0; i < 16; ++i)
      left[group + (i / 4 % 2 ? 8 : 0)][place * 4 + i % 4 + (i >= 8 ? 16 : 0)] = Byte(step.a[lane], i, is_signed);
    for (int i = 0; i < 8; ++i) right[place * 4 + i % 4 + (i >= 4 ? 16 : 0)][group] = Byte(step.b[lane], i, true);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 32; ++k)
        static_cast<int*>(step.c[lane])[i] += left[lane / 4 + (i >= 2 ? 8 : 0)][k] * right[k][lane % 4 * 2 + i % 2];
}

// One value of an operand in shared memory, 128 bytes a row, 128-byte swizzle: PTX ISA, "Shared memory matrix layout".
inline float Swizzled(unsigned address, int row, int k) {
  unsigned at = address + row * 128 + k / 8 * 16;
  at ^= (at >> 7 & 7) << 4;
  return Half(reinterpret_cast<unsigned*>(shared + at), k % 8);
}

// wgmma.m64nNk16: PTX ISA, "Matrix fragments for wgmma.mma_async.m64nNk16". Computed when the last thread asks for it.
inline void ComputeGroup(GroupStep& step, int columns) {
  static float left[64][16], right[16][256];
  for (int thread = 0; thread < 128; ++thread) {
    int group = thread % 32 / 4, place = thread % 4;
    for (int i = 0; i < 8; ++i) {
      int row = thread / 32 * 16 + group + (i / 2 % 2 ? 8 : 0), k = place * 2 + i % 2 + (i >= 4 ? 8 : 0);
      left[row][k] = Half(step.a[thread], i);
    }
  }
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < columns; ++n) right[k][n] = Swizzled(step.right, n, k);
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < columns / 2; ++i) {
      int row = thread / 32 * 16 + thread % 32 / 4 + (i % 4 >= 2 ? 8 : 0), column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float& total = static_cast<float*>(step.c[thread])[i];
      double sum = total;
      for (int k = 0; k < 16; ++k) sum += double(left[row][k]) * right[k][column];
      total = float(sum);
    }
}

// wgmma.m64nNk32 of integers: bytes lie where float16's halves do, four in a word.
inline void ComputeIntegers(GroupStep& step, int columns, bool is_signed) {
  static int left[64][32];
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < 16; ++i) {
      int row = thread / 32 * 16 + thread % 32 / 4 + (i / 4 % 2 ? 8 : 0), k = thread % 4 * 4 + i % 4 + (i >= 8 ? 16 : 0);
      left[row][k] = Byte(step.a[thread], i, is_signed);
    }
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < columns / 2; ++i) {
      int row = thread / 32 * 16 + thread % 32 / 4 + (i % 4 >= 2 ? 8 : 0), column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      for (int k = 0; k < 32; ++k) {
        unsigned at = step.right + column * 128 + k / 16 * 16;
        at ^= (at >> 7 & 7) << 4;
        static_cast<int*>(step.c[thread])[i] += left[row][k] * static_cast<signed char>(shared[at + k % 16]);
      }
    }
}

}  // namespace emulator

inline dim3 threadIdx, blockIdx;

inline void __syncthreads() {
  using namespace emulator;
  if (++at_barrier == running) {
    at_barrier = 0;
    ++barrier;
    return;
  }
  for (long own = barrier; barrier == own;) Yield();
}

template <class Sum, bool is_signed = true>
inline void WarpProduct(Sum* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  using namespace emulator;
  int lane = current % 32;
  Step& step = steps[current / 32];
  step.c[lane] = c;
  unsigned a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
  std::memcpy(step.a[lane], a, sizeof a);
  std::memcpy(step.b[lane], b, sizeof b);
  if (++step.arrived == 32) {
    if constexpr (std::is_same_v<Sum, float>)
      Compute(step);
    else
      ComputeIntegers(step, is_signed);
    step.arrived = 0;
    ++step.generation;
    return;
  }
  for (long own = step.generation; step.generation == own;) Yield();
}

#define qfp8_mma WarpProduct<float>
#define qfp8_mma_s8 WarpProduct<int>
#define qfp8_mma_u8 WarpProduct<int, false>

template <int columns, class Sum, bool is_signed = true>
inline void Product(Sum* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned right) {
  using namespace emulator;
  int thread = current % 128;
  GroupStep& step = group_steps[current / 128];
  step.c[thread] = c;
  unsigned a[] = {a0, a1, a2, a3};
  std::memcpy(step.a[thread], a, sizeof a);
  step.right = right;
  if (++step.arrived == 128) {
    if constexpr (std::is_same_v<Sum, float>)
      ComputeGroup(step, columns);
    else
      ComputeIntegers(step, columns, is_signed);
    step.arrived = 0;
    ++step.generation;
    return;
  }
  for (long own = step.generation; step.generation == own;) Yield();
}
#define qfp8_wgmma_f16_64 Product<64, float>
#define qfp8_wgmma_f16_128 Product<128, float>
#define qfp8_wgmma_s8_64 Product<64, int>
#define qfp8_wgmma_s8_128 Product<128, int>
#define qfp8_wgmma_u8_64 Product<64, int, false>
#define qfp8_wgmma_u8_128 Product<128, int, false>
inline void qfp8_copy_chunk(unsigned address, const void* source) { std::memcpy(emulator::shared + address, source, 16); }
inline void qfp8_end_copies() {}
inline void qfp8_await_copies_0() {}
inline void qfp8_await_copies_1() {}
inline void qfp8_mma_count(int* total, float start, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                           unsigned b1) {
  float c[] = {start, start, start, start};
  qfp8_mma(c, a0, a1, a2, a3, b0, b1);
  for (int i = 0; i < 4; ++i) total[i] = int(unsigned(total[i]) + unsigned(__float_as_int(c[i])));
}
inline void qfp8_begin_products() {}
inline void qfp8_end_products() {}
inline void qfp8_await_products_0() {}
inline void qfp8_await_products_1() {}
inline void qfp8_publish() { __syncthreads(); }
inline unsigned qfp8_shared_address(void* p) {
  emulator::shared = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(p) + 1023) & ~std::uintptr_t(1023));
  return 0;
}
inline int& SharedWord(unsigned address) { return *reinterpret_cast<int*>(emulator::shared + address); }
inline void qfp8_store_word(unsigned address, int value) { SharedWord(address) = value; }
inline int qfp8_load_word(unsigned address) { return SharedWord(address); }
inline void qfp8_add_word(unsigned address, int value) { SharedWord(address) += value; }
inline void qfp8_store_chunk(unsigned address, unsigned x, unsigned y, unsigned z, unsigned w) {
  unsigned words[] = {x, y, z, w};
  std::memcpy(emulator::shared + address, words, sizeof words);
}

namespace emulator {

inline void Run() {
  body(arguments);
  fibers[current].done = true;
  --running;
  Yield();
}

inline void Launch(void (*kernel)(void**), void** values, dim3 grid, int threads) {
  body = kernel;
  arguments = values;
  fibers.resize(threads);
  steps.assign((threads + 31) / 32, Step());
  group_steps.assign((threads + 127) / 128, GroupStep());
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        running = threads;
        at_barrier = 0;
        for (Fiber& fiber : fibers) {
          fiber.done = false;
          fiber.stack.resize(1 << 16);
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.data();
          fiber.context.uc_stack.ss_size = fiber.stack.size();
          fiber.context.uc_link = nullptr;
          makecontext(&fiber.context, Run, 0);
        }
        while (running)
          for (int i = 0; i < threads; ++i)
            if (!fibers[i].done) {
              current = i;
              threadIdx.x = i;
              swapcontext(&scheduler, &fibers[i].context);
            }
      }
}

}  // namespace emulator
