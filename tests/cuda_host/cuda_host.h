// SPDX-License-Identifier: MIT
// What csrc/cuda/gather/kernels.cuh uses of CUDA, for a CPU: the kernels run one thread at a time, as fibers.
//
// A fiber runs until its kernel returns or reaches an operation of its whole warp, such as a shuffle, where it waits
// for the other 31. Vector loads, stores and atomics check their alignment; bounds are left to AddressSanitizer. An
// error ends the launch with a message. Warps run one after the other, so a kernel may have shared memory if its blocks
// are one warp; it keeps what the block before has left there. Not covered: races between threads, code that is
// compiled for a GPU only, and speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

namespace cuda_host {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

struct Index {
  unsigned x;
};

// The 32 threads of a warp, and which of them is running.
struct Warp {
  ucontext_t scheduler, threads[kWarp];
  std::unique_ptr<char[]> stacks{new char[kWarp * kStack]};
  enum { kRuns, kWaits, kDone } state[kWarp];
  const char* operation[kWarp];  // that a thread waits in, and what must be the same for all threads
  unsigned parameter[kWarp];
  double value[kWarp];  // of a shuffle or a vote
  float a[kWarp][8], b[kWarp][4];  // parts of matrices
  int current = 0;
  std::string failure;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};

inline Warp warp;
inline Index block, thread;
inline unsigned order = 0;  // seed of the order of blocks, of the warps of each and of their threads; 0: ascending

inline std::vector<int64_t> permutation(int64_t count) {
  std::vector<int64_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  static std::mt19937 generator;
  if (order != 0) {
    generator.seed(order + static_cast<unsigned>(count));
    std::shuffle(numbers.begin(), numbers.end(), generator);
  }
  return numbers;
}

// Switches from one fiber to another, and tells AddressSanitizer.
inline void switch_fiber(ucontext_t& from, ucontext_t& to, bool to_scheduler) {
#if defined(__SANITIZE_ADDRESS__)
  static const void* scheduler_stack = nullptr;
  static size_t scheduler_size = 0;
  void* fake = nullptr;
  if (to_scheduler)
    __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_size);
  else
    __sanitizer_start_switch_fiber(&fake, warp.stacks.get() + warp.current * kStack, kStack);
  swapcontext(&from, &to);
  if (to_scheduler)  // back in a thread that had switched to the scheduler
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
  else
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)to_scheduler;
  swapcontext(&from, &to);
#endif
}

inline void to_scheduler() { switch_fiber(warp.threads[warp.current], warp.scheduler, true); }

// Ends the launch; this thread does not run again.
[[noreturn]] inline void fail(const char* what, const void* address = nullptr) {
  char text[200];
  std::snprintf(text, sizeof(text), "block %u, thread %u: %s (%p)", block.x, thread.x, what, address);
  if (warp.failure.empty()) warp.failure = text;
  for (;;) to_scheduler();
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  warp.body(warp.argument);
  warp.state[warp.current] = Warp::kDone;
  to_scheduler();
}

// Runs one warp to its end; false after a failure.
inline bool run_warp(unsigned first_thread) {
  const std::vector<int64_t> order = permutation(kWarp);
  for (int i = 0; i < kWarp; ++i) {
    getcontext(&warp.threads[i]);
    warp.threads[i].uc_stack.ss_sp = warp.stacks.get() + i * kStack;
    warp.threads[i].uc_stack.ss_size = kStack;
    warp.threads[i].uc_link = nullptr;
    makecontext(&warp.threads[i], enter, 0);
    warp.state[i] = Warp::kRuns;
  }
  for (;;) {
    int done = 0;
    for (const int64_t next : order) {
      const int i = static_cast<int>(next);
      if (warp.state[i] == Warp::kDone) {
        ++done;
        continue;
      }
      warp.state[i] = Warp::kRuns;
      warp.current = i;
      thread.x = first_thread + i;
      switch_fiber(warp.scheduler, warp.threads[i], false);
      if (!warp.failure.empty()) return false;
      done += warp.state[i] == Warp::kDone;
    }
    if (done == kWarp) return true;
    for (int i = 0; i < kWarp && warp.failure.empty(); ++i) {
      if (warp.state[i] == Warp::kDone)
        warp.failure = "a thread left the kernel while others of its warp wait in a shuffle or the like";
      else if (std::strcmp(warp.operation[i], warp.operation[0]) != 0 || warp.parameter[i] != warp.parameter[0])
        warp.failure = std::string("the threads of a warp came to different operations, ") + warp.operation[0] +
                       " and " + warp.operation[i];
    }
    if (!warp.failure.empty()) return false;
  }
}

// kernel<<<blocks of `width` threads>>>(arguments...); returns "" or an error message.
template <typename Kernel, typename... A>
std::string launch(Kernel* kernel, int64_t threads, int width, A... arguments) {
  auto call = [&] { kernel(arguments...); };
  warp.failure.clear();
  warp.argument = &call;
  warp.body = [](void* c) { (*static_cast<decltype(call)*>(c))(); };
  for (const int64_t b : permutation((threads + width - 1) / width)) {
    block.x = static_cast<unsigned>(b);
    for (const int64_t w : permutation(width / kWarp))
      if (!run_warp(static_cast<unsigned>(w * kWarp))) return warp.failure;
  }
  return "";
}

template <typename T>
void check_aligned(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) fail("misaligned address", address);
}

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace cuda_host

#define blockIdx cuda_host::block
#define threadIdx cuda_host::thread

// ---- vectors

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
T __ldg(const T* address) {
  cuda_host::check_aligned(address);
  return *address;
}
template <typename T>
void __stwb(T* address, T value) {
  cuda_host::check_aligned(address);
  *address = value;
}

// ---- numbers

inline float __uint_as_float(unsigned x) { return cuda_host::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return cuda_host::bits<unsigned>(x); }
inline double __hiloint2double(int high, int low) {
  return cuda_host::bits<double>(static_cast<uint64_t>(static_cast<unsigned>(high)) << 32 | static_cast<unsigned>(low));
}
inline int __double2hiint(double x) { return static_cast<int>(cuda_host::bits<uint64_t>(x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(cuda_host::bits<uint64_t>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
using std::exp;
using std::floor;

struct __half {
  uint16_t x;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t x;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __half2float(__half h) {
  const unsigned sign = (h.x & 0x8000u) << 16, exponent = h.x >> 10 & 31, fraction = h.x & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  const float size =
      exponent ? std::ldexp(1024.0f + fraction, static_cast<int>(exponent) - 25) : std::ldexp(float(fraction), -24);
  return sign ? -size : size;
}
inline __half __float2half_rn(float value) {
  const unsigned all = __float_as_uint(value), sign = all >> 16 & 0x8000u, size = all & 0x7fffffffu;
  unsigned half;
  if (size > 0x7f800000u)
    half = 0x7e00;
  else if (size >= 0x477ff000u)  // 65520, halfway to what would be 65536
    half = 0x7c00;
  else if (size < 0x38800000u)  // below 2^-14: a multiple of 2^-24
    half = static_cast<unsigned>(std::nearbyint(std::ldexp(__uint_as_float(size), 24)));
  else
    half = (size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(sign | half)};
}
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float(unsigned{b.x} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned all = __float_as_uint(value);
  if ((all & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((all + 0x7fffu + (all >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

// ---- between threads

template <typename T>
void atomicAdd(T* address, T value) {
  cuda_host::check_aligned(address);
  *address += value;
}
inline void atomicAdd(float4* address, float4 value) {
  cuda_host::check_aligned(address);
  address->x += value.x;
  address->y += value.y;
  address->z += value.z;
  address->w += value.w;
}

inline unsigned atomicMax(unsigned* address, unsigned value) {
  cuda_host::check_aligned(address);
  const unsigned before = *address;
  *address = before > value ? before : value;
  return before;
}

namespace cuda_host {

// Waits until all threads of the warp are here.
inline void meet(const char* operation, unsigned parameter) {
  warp.operation[warp.current] = operation;
  warp.parameter[warp.current] = parameter;
  warp.state[warp.current] = Warp::kWaits;
  to_scheduler();
}

// An operation of the warp: `give` leaves what other threads need, `take` reads what they left. No thread gives
// something to the next operation before all have taken.
template <typename Give, typename Take>
auto collect(const char* operation, unsigned parameter, Give give, Take take) {
  give(warp.current);
  meet(operation, parameter);
  const auto result = take(warp.current);
  meet(operation, parameter);
  return result;
}

inline void check_full(unsigned mask) {
  if (mask != 0xffffffffu) fail("only full warps are supported");
}

}  // namespace cuda_host

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned distance) {
  using cuda_host::warp;
  cuda_host::check_full(mask);
  return cuda_host::collect(
      "shuffle", distance, [&](int lane) { warp.value[lane] = static_cast<double>(value); },
      [&](int lane) { return static_cast<T>(warp.value[lane ^ distance]); });
}

inline int __any_sync(unsigned mask, int value) {
  using cuda_host::warp;
  cuda_host::check_full(mask);
  return cuda_host::collect(
      "vote", 0, [&](int lane) { warp.value[lane] = value != 0; },
      [&](int) {
        return static_cast<int>(std::count(warp.value, warp.value + cuda_host::kWarp, 0.0) < cuda_host::kWarp);
      });
}

inline void __syncwarp() { cuda_host::meet("synchronization", 0); }

inline int __ffs(int x) { return __builtin_ffs(x); }

inline long long __float2ll_rn(float x) { return std::llrint(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }

namespace internimage {
namespace cuda {

template <typename S>
struct Storage;

// What csrc/cuda/mma.cuh describes. The sums are in float32, in the order of k.
template <typename S>
void emulate_mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using cuda_host::warp;
  const auto unpack = [](uint32_t word, float* to) { Storage<S>::template unpack<2>(&word, to); };
  const auto result = cuda_host::collect(
      "mma", sizeof(S),
      [&](int lane) {
        for (int i = 0; i < 4; ++i) unpack(a[i], warp.a[lane] + 2 * i);
        for (int i = 0; i < 2; ++i) unpack(b[i], warp.b[lane] + 2 * i);
      },
      [&](int lane) {
        float4 total = {sums[0], sums[1], sums[2], sums[3]};
        float* const totals[4] = {&total.x, &total.y, &total.z, &total.w};
        for (int i = 0; i < 4; ++i)
          for (int k = 0; k < 16; ++k) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2, from = k % 8 / 2;
            const float left = warp.a[row % 8 * 4 + from][2 * (row / 8 + k / 8 * 2) + k % 2];
            const float right = warp.b[column * 4 + from][k / 8 * 2 + k % 2];
            *totals[i] += left * right;
          }
        return total;
      });
  sums[0] = result.x, sums[1] = result.y, sums[2] = result.z, sums[3] = result.w;
}

}  // namespace cuda
}  // namespace internimage
