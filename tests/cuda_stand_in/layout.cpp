// SPDX-License-Identifier: MIT
// What the launcher of csrc/cuda/driver asks NVRTC for, according to the host's compiler: the names of all kernels
// (apart from them, those of layouts that are not dense), and where the fields of their arguments are. Prints JSON.
#include <cstddef>
#include <cstdio>
#include <map>
#include <string>

#include "../../csrc/cuda/driver/names.h"
#include "../../csrc/cuda/gather/select.h"
#include "../../csrc/cuda/gather/variants.h"

namespace cuda = internimage::cuda;
using internimage::Problem;

namespace {

std::map<std::string, size_t> dense_kernels, other_kernels;

struct Launch {
  static constexpr bool kHasVariants = true;
  static constexpr bool kHasLayouts = true;
  std::map<std::string, size_t>& kernels;
  template <typename Kernel, typename First, typename... A>
  void operator()(Kernel kernel, int64_t, First, A...) const {
    kernels[cuda::name_of(kernel)] = sizeof(First);
  }
};

template <typename S>
void ask(Problem p, bool wide, const cuda::Variants& variants) {
  using T = cuda::Compute<S>;
  S* s = reinterpret_cast<S*>(32);
  T* t = reinterpret_cast<T*>(32);
  for (const int64_t padding : {0, 2, 1}) {  // dense, and at even and at odd elements
    p.mask = p.grad_mask = {p.points + padding, p.points};
    p.offset = p.grad_offset = {2 * p.points + padding, 2 * p.points};
    const Launch launch{padding == 0 ? dense_kernels : other_kernels};
    cuda::forward(p, s, s, s, s, wide, variants, launch);
    for (bool deterministic : {false, true})
      cuda::backward(p, s, s, s, s, t, s, s, deterministic, nullptr, wide, variants, launch);
  }
}

void print_kernels(const char* key, const std::map<std::string, size_t>& kernels) {
  std::printf("\"%s\": {", key);
  int first = 0;
  for (const auto& [name, bytes] : kernels) std::printf("%s\"%s\": %zu", first++ ? ", " : "", name.c_str(), bytes);
  std::printf("}, ");
}

#define FIELD(name) std::printf("%s[\"%s\", %zu, %zu]", first++ ? ", " : "", #name, offsetof(A, name), sizeof(A::name))

template <typename T, typename Index>
void print_fields(const char* type) {
  using A = cuda::Arguments<T, Index>;
  int first = 0;
  std::printf("\"%s\": {\"size\": %zu, \"fields\": [", type, sizeof(A));
  FIELD(threads), FIELD(slices), FIELD(lane_bits), FIELD(lanes), FIELD(chunks), FIELD(groups), FIELD(out_width);
  FIELD(out_height), FIELD(channels), FIELD(width), FIELD(row_elements), FIELD(image_elements), FIELD(group_channels);
  FIELD(points), FIELD(kernel_h), FIELD(kernel_w), FIELD(dilation_h), FIELD(dilation_w), FIELD(center_h);
  FIELD(center_w), FIELD(stride_h), FIELD(stride_w), FIELD(first_y), FIELD(first_x), FIELD(out_rows);
  FIELD(out_columns), FIELD(right_end), FIELD(lower_end), FIELD(last_column), FIELD(last_row), FIELD(grid_x);
  FIELD(grid_y), FIELD(offset_scale), FIELD(remove_center), FIELD(softmax), FIELD(height), FIELD(tiles_across),
      FIELD(tiles_down);
  FIELD(tile_width), FIELD(tile_height), FIELD(tile_threads), FIELD(chunk_threads), FIELD(last_slices);
  FIELD(full_chunks), FIELD(row_major), FIELD(y_first), FIELD(offset), FIELD(mask), FIELD(grad_offset);
  FIELD(grad_mask);
  std::printf("]}");
}

}  // namespace

int main() {
  for (int64_t group_channels : {1, 2, 4, 8, 16, 32, 512})
    for (int64_t side : {2, 3})
      for (bool remove_center : {false, true})
        for (bool softmax : {false, true})
          for (bool wide : {false, true}) {
            Problem p = {};
            p.batch = p.height = p.width = p.out_height = p.out_width = p.groups = 1;
            p.channels = p.group_channels = group_channels;
            p.kernel_h = p.kernel_w = side;
            p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
            p.points = side * side - remove_center;
            p.remove_center = remove_center;
            p.softmax = softmax;
            for (const bool chosen : {false, true}) {
              const cuda::Variants variants = {chosen, chosen, chosen};
              ask<cuda::HalfBits>(p, wide, variants);
              ask<cuda::BFloat16Bits>(p, wide, variants);
              ask<float>(p, wide, variants);
              ask<double>(p, wide, variants);
            }
          }
  std::printf("{");
  print_kernels("kernels", dense_kernels);
  print_kernels("other_kernels", other_kernels);
  std::printf("\"arguments\": {");
  print_fields<float, uint32_t>("float, uint32_t"), std::printf(", ");
  print_fields<float, uint64_t>("float, uint64_t"), std::printf(", ");
  print_fields<double, uint32_t>("double, uint32_t"), std::printf(", ");
  print_fields<double, uint64_t>("double, uint64_t");
  std::printf("}}\n");
}
