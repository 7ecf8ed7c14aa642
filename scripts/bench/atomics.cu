// SPDX-License-Identifier: MIT
// Atomic additions in the footprint of DCNv3's backward, without its arithmetic: what they cost alone.
//
// A row is the 16 channels of a group and pixel. A unit adds to 36 rows, for 9 points of 4 corners each. Its lanes are
// adjacent threads, and each has the channels that one instruction of an operation takes.
#include <cstdint>

enum Operation { kRedV4, kRedV4Twice, kRedV2, kRed, kRedOneByOne, kRedU64, kStoreV4, kNothingV4, kNothing };
enum Pattern { kWindow, kAnywhere, kStreaming };
constexpr uint32_t kChannels = 16, kPoints = 9, kCorners = 4, kThreads = 256;

// Channels of a thread.
template <int kOperation>
struct Width {
  static constexpr bool kIsOne = kOperation == kRed || kOperation == kRedU64 || kOperation == kNothing;
  static constexpr uint32_t value = kIsOne ? 1 : kOperation == kRedV2 ? 2 : kOperation == kRedV4Twice ? 8 : 4;
};

// Adds 1 to this lane's channels, or stores it. kRedV4Twice is what the backward of 3x3 kernels does: the two lanes of
// a row add to one sector of it, and then to the other.
template <int kOperation>
__device__ __forceinline__ void perform(char* row, uint32_t lane) {
  const uint32_t bytes = kOperation == kRedU64 ? 8 : 4;
  char* const at = row + lane * (kOperation == kRedV4Twice ? 4 : Width<kOperation>::value) * bytes;
#ifndef __CUDA_ARCH__  // on a host, which has no atomic operations of this kind
  constexpr bool is_nothing = kOperation == kNothingV4 || kOperation == kNothing;
  for (uint32_t i = 0; i < Width<kOperation>::value && !is_nothing; ++i) {
    if (kOperation == kRedU64) {
      reinterpret_cast<uint64_t*>(at)[i] += 1;
    } else {
      float& value = reinterpret_cast<float*>(at)[i < 4 ? i : i + 4];
      value = kOperation == kStoreV4 ? 1.0f : value + 1.0f;
    }
  }
#else
  if constexpr (kOperation == kNothingV4 || kOperation == kNothing) {
    asm volatile("" ::"l"(at));  // the address alone
  } else if constexpr (kOperation == kRedU64) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(at), "l"(uint64_t{1}) : "memory");
  } else if constexpr (kOperation == kRed) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(at), "f"(1.0f) : "memory");
  } else if constexpr (kOperation == kRedOneByOne) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(at + 4 * i), "f"(1.0f) : "memory");
  } else if constexpr (kOperation == kStoreV4) {
    asm volatile("st.global.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(at), "f"(1.0f) : "memory");
  } else {
#if __CUDA_ARCH__ >= 900
    if constexpr (kOperation == kRedV4)
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(at), "f"(1.0f) : "memory");
    else if constexpr (kOperation == kRedV4Twice)
      asm volatile(
          "red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %1, %1, %1};"
          "red.relaxed.gpu.global.add.v4.f32 [%0 + 32], {%1, %1, %1, %1};" ::"l"(at),
          "f"(1.0f)
          : "memory");
    else
      asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %1};" ::"l"(at), "f"(1.0f) : "memory");
#endif
  }
#endif
}

__device__ __forceinline__ uint32_t scramble(uint32_t value) {
  value = (value ^ (value >> 16)) * 0x7feb352du;
  value = (value ^ (value >> 15)) * 0x846ca68bu;
  return value ^ (value >> 16);
}

// About normal, with standard deviation 1: the sum of four bytes.
__device__ __forceinline__ float normal(uint32_t bits) {
  const uint32_t sum = (bits & 255) + (bits >> 8 & 255) + (bits >> 16 & 255) + (bits >> 24);
  return (static_cast<float>(sum) - 510.0f) * (1.0f / 147.8f);
}

__device__ __forceinline__ uint32_t clamped(int32_t value, uint32_t side) {
  return value < 0 ? 0 : static_cast<uint32_t>(value) < side ? static_cast<uint32_t>(value) : side - 1;
}

// Units beyond those of `images` images begin again with the first image, so that a small footprint takes as many
// operations as a large one. Every unit adds to 36 rows: a corner outside the image is replaced by the border's.
template <int kOperation, int kPattern>
__global__ void __launch_bounds__(kThreads)
    add(char* memory, uint32_t units, uint32_t images, uint32_t side, uint32_t groups) {
  constexpr uint32_t kLanes = kChannels / Width<kOperation>::value;
  constexpr uint32_t kRowBytes = kChannels * (kOperation == kRedU64 ? 8 : 4);
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, unit = thread / kLanes, lane = thread % kLanes;
  if (unit >= units) return;
  const uint32_t rows = images * side * side * groups;
  const uint32_t pixel = unit / groups, group = unit % groups;
  const int32_t x = static_cast<int32_t>(pixel % side), y = static_cast<int32_t>(pixel / side % side);
  const uint32_t image = pixel / (side * side) % images;
  constexpr uint32_t kUnits = kThreads / kLanes;  // of a block
  for (uint32_t point = 0; point < kPoints; ++point) {
    const uint32_t random = scramble(unit * kPoints + point);
    const int32_t left = static_cast<int32_t>(floorf(x - 1 + static_cast<int32_t>(point / 3) + normal(random)));
    const int32_t top =
        static_cast<int32_t>(floorf(y - 1 + static_cast<int32_t>(point % 3) + normal(scramble(random))));
#pragma unroll
    for (uint32_t corner = 0; corner < kCorners; ++corner) {
      uint32_t row;
      if constexpr (kPattern == kWindow) {
        const uint32_t column = clamped(left + static_cast<int32_t>(corner % 2), side);
        const uint32_t line = clamped(top + static_cast<int32_t>(corner / 2), side);
        row = ((image * side + line) * side + column) * groups + group;
      } else if constexpr (kPattern == kAnywhere) {
        row = scramble(random + corner * 0x9e3779b9u) % rows;
      } else {
        row = ((blockIdx.x * kPoints + point) * kCorners + corner) * kUnits + threadIdx.x / kLanes;
        row %= rows;
      }
      perform<kOperation>(memory + static_cast<uint64_t>(row) * kRowBytes, lane);
    }
  }
}

#ifdef __CUDA_ARCH__
// The multiprocessors' clock: how many of its cycles pass in so many nanoseconds.
__global__ void count_cycles(uint64_t nanoseconds, uint64_t* cycles_and_nanoseconds) {
  uint64_t begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin)::"memory");
  const uint64_t first = clock64();
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  } while (now - begin < nanoseconds);
  cycles_and_nanoseconds[0] = clock64() - first;
  cycles_and_nanoseconds[1] = now - begin;
}
#endif
