// SPDX-License-Identifier: MIT
// What csrc/cuda/gather/kernels.cuh uses of CUDA, for a CPU: the kernels run one thread at a time, as fibers.
//
// A fiber runs until its kernel returns or reaches a shuffle, where it waits for the other 31 of its warp. Vector
// loads, stores and atomics check their alignment; bounds are left to AddressSanitizer. An error ends the launch with a
// message. Not covered: races between threads, code that is compiled for a GPU only, and speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

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
  enum { kRuns, kShuffles, kDone } state[kWarp];
  unsigned distance[kWarp];
  double value[kWarp];
  int current = 0;
  std::string failure;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};

inline Warp warp;
inline Index block, thread;

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
    for (int i = 0; i < kWarp; ++i) {
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
    for (int i = 0; i < kWarp; ++i) {
      if (warp.state[i] == Warp::kDone)
        warp.failure = "a thread left the kernel while others of its warp wait in a shuffle";
      else if (warp.distance[i] != warp.distance[0])
        warp.failure = "the threads of a warp came to different shuffles";
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
  for (int64_t b = 0; b < (threads + width - 1) / width; ++b) {
    block.x = static_cast<unsigned>(b);
    for (int first = 0; first < width; first += kWarp)
      if (!run_warp(first)) return warp.failure;
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

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned distance) {
  using namespace cuda_host;
  if (mask != 0xffffffffu) fail("only full warps are supported");
  const int lane = warp.current;
  warp.value[lane] = static_cast<double>(value);
  warp.distance[lane] = distance;
  warp.state[lane] = Warp::kShuffles;
  to_scheduler();
  const T result = static_cast<T>(warp.value[lane ^ distance]);
  // no thread may write its next value before all have read this one
  warp.distance[lane] = 0;
  warp.state[lane] = Warp::kShuffles;
  to_scheduler();
  return result;
}
