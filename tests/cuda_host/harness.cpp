// SPDX-License-Identifier: MIT
// The CUDA kernels on a CPU, as a shared library for ctypes. Passes return "" or an error message. With LAYOUTS, there
// are kernels of all layouts, three times as many; with LAYOUTS_OF_HALF, of float16 alone, and none of bfloat16.
#include "cuda_host.h"
// last, as it needs the names above
#include "../../csrc/cuda/gather/kernels.cuh"
#include "../../csrc/cuda/gather/variants.h"
#include "../../csrc/cuda/mma.cuh"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

std::string message, kernels;
bool runs_kernels = true;
internimage::cuda::Variants variants = {};
#ifdef LAYOUTS
constexpr bool kAllLayouts = true;
#else
constexpr bool kAllLayouts = false;
#endif
#ifdef LAYOUTS_OF_HALF
constexpr bool kHalfLayouts = true;
#else
constexpr bool kHalfLayouts = false;
#endif

// The name of a template instantiation, as in "forward_kernel<__half, 16, 9, true, unsigned int>".
std::string readable(const char* mangled) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : mangled;
  std::free(demangled);
  name = name.substr(0, name.find('('));
  return name.substr(name.find("cuda::") + 6);
}

std::string name_of(const void* function) {
  Dl_info info;
  return dladdr(function, &info) && info.dli_sname != nullptr ? readable(info.dli_sname) : "?";
}

// What the driver would do with the kernels that were launched before: by name, with pointers to the arguments.
std::map<std::string, std::function<void(int64_t, void**)>> by_name;
std::vector<char> first_argument;  // of the last launch

template <typename Kernel, typename... A, size_t... I>
void remember(const std::string& name, Kernel* kernel, int width, std::index_sequence<I...>) {
  by_name[name] = [kernel, width](int64_t threads, void** arguments) {
    using First = std::tuple_element_t<0, std::tuple<A...>>;
    const char* begin = static_cast<const char*>(arguments[0]);
    first_argument.assign(begin, begin + sizeof(First));
    message = cuda_host::launch(kernel, threads, width, *static_cast<A*>(arguments[I])...);
  };
}

template <typename S>
struct Launch {
  static constexpr bool kHasVariants = true;
  static constexpr bool kHasLayouts = kAllLayouts || (kHalfLayouts && std::is_same<S, __half>::value);
  template <typename Kernel, typename... A>
  void operator()(Kernel name, int64_t threads, A... arguments) const {
    if (!message.empty()) return;
    const auto kernel = internimage::cuda::function_of(name);
    const std::string readable_name = name_of(reinterpret_cast<const void*>(kernel));
    kernels += readable_name + ";";
    remember<std::remove_pointer_t<decltype(kernel)>, A...>(
        readable_name, kernel, internimage::cuda::kBlockThreads<Kernel>, std::index_sequence_for<A...>());
    void* pointers[] = {&arguments...};
    if (runs_kernels) by_name[readable_name](threads, pointers);
  }
};

template <typename Run>
const char* with_dtype(const char* dtype, const Run& run) {
  const std::string name = dtype;
  message.clear();
  kernels.clear();
  if (name == "float16") {
    run(__half());
  } else if (name == "float32") {
    run(float());
  } else if (name == "float64") {
    run(double());
  } else if constexpr (!kHalfLayouts) {
    if (name == "bfloat16")
      run(__nv_bfloat16());
    else
      message = "no such dtype";
  } else {
    message = "not in this build";
  }
  return message.c_str();
}

}  // namespace

extern "C" {

// The kernels of the last call, each followed by a semicolon.
const char* launched() { return kernels.c_str(); }

// Whether calls run their kernels, or only record their names.
void set_runs_kernels(bool value) { runs_kernels = value; }

// The variants of the next calls, as in INTERNIMAGE_CUDA_VARIANTS; false if there is no such list.
bool set_variants(const char* list) { return internimage::cuda::parse_variants(list, variants); }

// The order in which threads run from now on: another one for each seed, ascending for 0.
void set_order(unsigned seed) { cuda_host::order = seed; }

const char* forward(const char* dtype, const internimage::Problem* p, const void* input, const void* offset,
                    const void* mask, void* output, bool wide) {
  return with_dtype(dtype, [&](auto zero) {
    using S = decltype(zero);
    internimage::cuda::forward(*p, (const S*)input, (const S*)offset, (const S*)mask, (S*)output, wide, variants,
                               Launch<S>());
  });
}

const char* backward(const char* dtype, const internimage::Problem* p, const void* grad_output, const void* input,
                     const void* offset, const void* mask, void* grad_input, void* grad_offset, void* grad_mask,
                     bool deterministic, bool wide) {
  std::vector<uint64_t> memory;
  return with_dtype(dtype, [&](auto zero) {
    using S = decltype(zero);
    if (runs_kernels && grad_input != nullptr)
      memory.resize(internimage::cuda::fixed_elements<S>(*p, deterministic, variants));
    internimage::cuda::backward(*p, (const S*)grad_output, (const S*)input, (const S*)offset, (const S*)mask,
                                (internimage::cuda::Compute<S>*)grad_input, (S*)grad_offset, (S*)grad_mask,
                                deterministic, memory.data(), wide, variants, Launch<S>());
  });
}

// Runs a kernel as cuLaunchKernel does; it must have been launched before.
void launch_by_name(const char* mangled, void** arguments, unsigned blocks, unsigned threads) {
  message.clear();
  const auto found = by_name.find(readable(mangled));
  if (found == by_name.end())
    message = readable(mangled) + " was not launched before";
  else
    found->second(int64_t{blocks} * threads, arguments);
}

const char* last_message() { return message.c_str(); }

// Bytes of the first argument of the last launch.
const char* last_arguments(int64_t* size) {
  *size = static_cast<int64_t>(first_argument.size());
  return first_argument.data();
}

// quotients[i] = dividends[i] / divisor
void divide(uint32_t divisor, const uint32_t* dividends, uint32_t* quotients, int64_t n) {
  const internimage::cuda::Divider<uint32_t> divider(divisor);
  for (int64_t i = 0; i < n; ++i) quotients[i] = internimage::cuda::quotient(dividends[i], divider);
}

// A warp whose first thread comes to another operation than the others; returns what is said of it.
const char* different_operations(int which) {
  const auto kernel = [](int chosen) {
    const bool is_first = threadIdx.x == 0;
    if (chosen == 0) {
      is_first ? __syncwarp() : static_cast<void>(__any_sync(0xffffffffu, 1));
    } else if (chosen == 1) {
      __shfl_xor_sync(0xffffffffu, 1, is_first ? 2 : 1);
    } else {
      float sums[4] = {};
      const uint32_t a[4] = {}, b[2] = {};
      is_first ? internimage::cuda::mma<__half>(sums, a, b) : __syncwarp();
    }
  };
  message = cuda_host::launch(+kernel, 32, 32, which);
  return message.c_str();
}

// result = a * b + c: 16 x 16 and 16 x 8 matrices of __half, then 16 x 8 of float.
void product(const uint16_t* a, const uint16_t* b, const float* c, float* result) {
  const auto kernel = [](const uint16_t* a, const uint16_t* b, const float* c, float* result) {
    const unsigned row = threadIdx.x / 4, column = threadIdx.x % 4 * 2;
    const auto word = [](uint16_t low, uint16_t high) { return uint32_t{low} | uint32_t{high} << 16; };
    const auto of_a = [&](unsigned i, unsigned k) { return word(a[16 * i + k], a[16 * i + k + 1]); };
    const auto of_b = [&](unsigned k) { return word(b[8 * k + row], b[8 * (k + 1) + row]); };
    const uint32_t left[4] = {of_a(row, column), of_a(row + 8, column), of_a(row, column + 8),
                              of_a(row + 8, column + 8)};
    const uint32_t right[2] = {of_b(column), of_b(column + 8)};
    float sums[4];
    for (unsigned i = 0; i < 4; ++i) sums[i] = c[8 * (row + i / 2 * 8) + column + i % 2];
    internimage::cuda::mma<__half>(sums, left, right);
    for (unsigned i = 0; i < 4; ++i) result[8 * (row + i / 2 * 8) + column + i % 2] = sums[i];
  };
  message = cuda_host::launch(+kernel, 32, 32, a, b, c, result);
}

// Where the window kernel has a value in shared memory, and the pixel of a unit in its tile.
unsigned window_word(unsigned line, unsigned column, unsigned unit) {
  return internimage::cuda::word_of(line, column, unit);
}
unsigned window_position(unsigned unit) {
  return 8 * internimage::cuda::row_of_unit(unit) + internimage::cuda::column_of_unit(unit);
}

// Converts a value to the storage type and back.
float round_trip(const char* dtype, float value) {
  float result = 0;
  with_dtype(dtype, [&](auto zero) {
    using Storage = internimage::cuda::Storage<decltype(zero)>;
    result = static_cast<float>(Storage::widen(Storage::narrow(value)));
  });
  return result;
}
}
