// SPDX-License-Identifier: MIT
// A block of InternImage in inference, as one operator: models/fused_block.py says what it computes. The calls that it
// consists of are made here, as a call from Python takes 5 to 15 us, and a block has 25. LibTorch stable ABI only.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "../../boxed.h"
#include "../../dense.h"
#include "../../library.h"
#include "../isa/dispatch.h"
#include "../isa/kernel_table.h"
#include "../operators.h"

namespace internimage {
namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;
using Optional = std::optional<Tensor>;

// ---- functions of torch

// aoti_torch_cpu__linear_pointwise, oneDNN's linear layer in the C interface that torch compiles models to; its header
// is not for extensions. Looked up, as not every build of torch has it.
using OneDnnLinear = AOTITorchError (*)(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias,
                                        const char* post_op, const double** scalars, int64_t scalar_count,
                                        const char** algorithm, AtenTensorHandle* output);
OneDnnLinear onednn_linear() {
  static const auto function = reinterpret_cast<OneDnnLinear>(symbol_of_torch("aoti_torch_cpu__linear_pointwise"));
  return function;
}

template <typename... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// ---- the arguments, in the order of models/fused_block.py

enum WeightName {
  kBefore1,
  kBefore1Bias,
  kBefore2,
  kBefore2Bias,  // norms of the input of a branch
  kAfter1,
  kAfter1Bias,
  kAfter2,
  kAfter2Bias,  // norms of its output
  kScale1,
  kScale2,
  kConv,
  kConvBias,
  kQueryNorm,
  kQueryNormBias,
  kBlend,
  kBlendBias,  // center_feature_scale
  kFirstProduct,  // of each product the weight, the bias and the packed weight, in the order of ProductName
};

// kOffsetAndMask is one product if it is packed, and else two: kOffset and kMask.
enum ProductName { kInputProj, kOffsetAndMask, kOffset, kMask, kOutputProj, kFc1, kFc2, kProducts };

enum EpsName { kEpsBefore1, kEpsBefore2, kEpsAfter1, kEpsAfter2, kEpsQuery, kOffsetScale, kNumbers };

enum SettingName {
  kMethod,  // a Method
  kMinRows,  // with fewer, products are computed by torch
  kQueryStride,
  kQueryPadding = kQueryStride + 2,  // pairs
  kKernelSize = kQueryPadding + 2,
  kStride = kKernelSize + 2,
  kPadding = kStride + 2,
  kDilation = kPadding + 2,
  kGroups = kDilation + 2,
  kRemoveCenter,
  kSoftmax,
  kSettings
};

// How products of at least kMinRows rows are computed: as layers/linear.py does.
enum Method : int64_t { kByTorch, kByOneDnn, kByOneDnnInFloat };

// ---- the block

class Block {
 public:
  Block(const std::vector<Optional>& weights, const std::vector<int64_t>& settings, const std::vector<double>& numbers,
        int64_t mlp_rows)
      : weights_(weights), settings_(settings), numbers_(numbers), mlp_rows_(mlp_rows) {
    STD_TORCH_CHECK(weights.size() == kFirstProduct + 3 * kProducts && settings.size() == kSettings &&
                        numbers.size() == kNumbers && mlp_rows > 0,
                    "internimage::block: wrong number of weights, settings or numbers");
  }

  Tensor operator()(const Tensor& x) const {
    Tensor branch = sample(x);
    if (has(kAfter1)) {
      Tensor sum = layer_norm(branch, weight(kAfter1), weight(kAfter1Bias), numbers_[kEpsAfter1], x, weights_[kScale1]);
      add_mlp(sum, std::nullopt);
      return sum;
    }
    if (has(kScale1)) {
      add(x, branch, weights_[kScale1], branch);
      add_mlp(branch, std::nullopt);
    } else {
      add_mlp(branch, x);
    }
    return branch;
  }

 private:
  bool has(int name) const { return weights_[name].has_value(); }
  const Tensor& weight(int name) const { return weights_[name].value(); }
  std::vector<int64_t> pair(int name) const { return {settings_[name], settings_[name + 1]}; }

  // Whether x has too few rows for oneDNN.
  bool is_short(const Tensor& x) const { return x.numel() < settings_[kMinRows] * x.size(x.dim() - 1); }

  Tensor product(const Tensor& x, ProductName name) const {
    const int at = kFirstProduct + 3 * name;
    const Optional& packed = weights_[at + 2];
    const int64_t method = is_short(x) ? kByTorch : settings_[kMethod];
    if (method == kByTorch) return call("aten::linear", "", x, weight(at), weights_[at + 1]);
    if (method == kByOneDnn) return by_onednn(x, packed ? *packed : weight(at), weight(at + 1));
    using torch::headeronly::ScalarType;
    const auto wide = [](const Tensor& t) { return torch::stable::to(t, ScalarType::Float); };
    return torch::stable::to(by_onednn(wide(x), wide(weight(at)), wide(weight(at + 1))), x.scalar_type());
  }

  static Tensor by_onednn(const Tensor& x, const Tensor& weight, const Tensor& bias) {
    AtenTensorHandle bias_handle = bias.get(), output = nullptr;
    const char* algorithm = "";
    TORCH_ERROR_CODE_CHECK(
        onednn_linear()(x.get(), weight.get(), &bias_handle, "none", nullptr, 0, &algorithm, &output));
    return Tensor(output);
  }

  // output <- x + y * scale; the output may be x or y.
  static void add(const Tensor& x, const Tensor& y, const Optional& scale, const Tensor& output) {
    const int64_t channels = x.size(x.dim() - 1), rows = x.numel() / channels;
    const auto fits = [&](const Tensor& t) { return t.is_contiguous() && t.scalar_type() == x.scalar_type(); };
    STD_TORCH_CHECK(x.is_contiguous() && fits(y) && same_sizes(x, y) &&
                        (!scale || (fits(*scale) && scale->dim() == 1 && scale->size(0) == channels)),
                    "internimage::block: a branch and its scale must have input's sizes and dtype");
    const Kernels& kernels = kernels_of(x.scalar_type());
    const void *first = x.const_data_ptr(), *second = y.const_data_ptr();
    const void* factors = scale ? scale->const_data_ptr() : nullptr;
    void* out = output.mutable_data_ptr();
    torch::stable::parallel_for(0, rows, 1 + 16384 / channels, [&](int64_t begin, int64_t end) {
      kernels.scaled_sum(first, second, factors, out, channels, begin, end);
    });
  }

  // The branch of DCNv3, before the norm that ends it; in memory of its own.
  Tensor sample(const Tensor& x) const {
    const Tensor normalized = has(kBefore1) ? layer_norm(x, weight(kBefore1), weight(kBefore1Bias),
                                                         numbers_[kEpsBefore1], std::nullopt, std::nullopt)
                                            : x;
    const Tensor projected = product(normalized, kInputProj);
    const Tensor query =
        internimage::query(normalized, weight(kConv), weights_[kConvBias], weight(kQueryNorm), weight(kQueryNormBias),
                           pair(kQueryStride), pair(kQueryPadding), numbers_[kEpsQuery]);
    Tensor y = gather(projected, query);
    if (has(kBlend)) y = blend(y, projected, query);
    return product(y, kOutputProj);
  }

  Tensor gather(const Tensor& projected, const Tensor& query) const {
    const auto run = [&](const Tensor& offset, const Tensor& mask) {
      return dcnv3(projected, offset, mask, pair(kKernelSize), pair(kStride), pair(kPadding), pair(kDilation),
                   settings_[kGroups], numbers_[kOffsetScale], settings_[kRemoveCenter] != 0, settings_[kSoftmax] != 0);
    };
    const bool joined = has(kFirstProduct + 3 * kOffsetAndMask + 2) && !is_short(query);
    if (!joined) return run(product(query, kOffset), product(query, kMask));
    Tensor both = product(query, kOffsetAndMask);
    const int64_t channels = both.size(3), offsets = channels / 3 * 2;
    return run(torch::stable::narrow(both, 3, 0, offsets), torch::stable::narrow(both, 3, offsets, channels - offsets));
  }

  // y, blended with what was sampled from, by a learned share per group.
  Tensor blend(const Tensor& y, const Tensor& projected, const Tensor& query) const {
    const Tensor logits = call("aten::linear", "", query, weight(kBlend), weights_[kBlendBias]);
    const Tensor share = torch::stable::unsqueeze(call("aten::sigmoid_", "", logits), 4);
    const int64_t groups = settings_[kGroups];
    const std::vector<int64_t> grouped = {y.size(0), y.size(1), y.size(2), groups, y.size(3) / groups};
    const Tensor blended =
        call("aten::lerp", "Tensor", torch::stable::view(y, grouped), torch::stable::view(projected, grouped), share);
    return torch::stable::view(dense(blended), {y.size(0), y.size(1), y.size(2), y.size(3)});
  }

  // x <- x + addend plus the branch of the MLP, in chunks of rows that stay in the cache.
  void add_mlp(const Tensor& x, const Optional& addend) const {
    const int64_t channels = x.size(3), rows = x.numel() / channels;
    Tensor all = torch::stable::view(x, {rows, channels});
    Optional addends;
    if (addend) addends = torch::stable::view(*addend, {rows, channels});
    for (int64_t begin = 0; begin < rows; begin += mlp_rows_) {
      const int64_t count = begin + mlp_rows_ < rows ? mlp_rows_ : rows - begin;
      if (count == rows)
        add_mlp_rows(all, addends);
      else
        add_mlp_rows(torch::stable::narrow(all, 0, begin, count),
                     addends ? Optional(torch::stable::narrow(*addends, 0, begin, count)) : std::nullopt);
    }
  }

  void add_mlp_rows(const Tensor& rows, const Optional& addend) const {
    Tensor y = mlp_input(rows, addend);
    y = product(y, kFc1);
    gelu_(y);
    y = product(y, kFc2);
    if (has(kAfter2))
      add_layer_norm_(rows, y, weight(kAfter2), weight(kAfter2Bias), numbers_[kEpsAfter2], weights_[kScale2]);
    else
      add(rows, y, weights_[kScale2], rows);
  }

  // rows <- rows + addend; returns their norm, if there is one.
  Tensor mlp_input(const Tensor& rows, const Optional& addend) const {
    if (has(kBefore2)) {
      const Tensor &gamma = weight(kBefore2), &beta = weight(kBefore2Bias);
      const double eps = numbers_[kEpsBefore2];
      return addend ? norm_of_sum_(rows, *addend, gamma, beta, eps)
                    : layer_norm(rows, gamma, beta, eps, std::nullopt, std::nullopt);
    }
    if (addend) add(rows, *addend, std::nullopt, rows);
    return rows;
  }

  const std::vector<Optional>& weights_;
  const std::vector<int64_t>& settings_;
  const std::vector<double>& numbers_;
  const int64_t mlp_rows_;
};

Tensor block(const Tensor& input, std::vector<Optional> weights, std::vector<int64_t> settings,
             std::vector<double> numbers, int64_t mlp_rows) {
  STD_TORCH_CHECK(input.dim() == 4 && input.is_contiguous(), "internimage::block: input must be (N, H, W, C)");
  return Block(weights, settings, numbers, mlp_rows)(input);
}

}  // namespace
}  // namespace internimage

STABLE_TORCH_LIBRARY_IMPL(internimage, CPU, m) {
  if (internimage::onednn_linear() != nullptr) m.impl("block", INTERNIMAGE_BOX(&internimage::block));
}

STABLE_TORCH_LIBRARY_IMPL(internimage, MkldnnCPU, m) {  // the key of a packed weight, which comes before CPU
  if (internimage::onednn_linear() != nullptr) m.impl("block", INTERNIMAGE_BOX(&internimage::block));
}
