// SPDX-License-Identifier: MIT
// Sampling points of DCNv3: a strip of them at a time, vectorised over the points. Where each samples, with what weights.

namespace internimage {
namespace INTERNIMAGE_ISA {

constexpr int64_t kStripPoints = 576;  // all that is kept of a strip fits the first-level cache

// The groups of an image, cut into blocks that are taken together.
struct Blocks {
  int64_t all, size, count;

  Blocks(const Problem& p, int64_t most) : all(p.groups), size(most < all ? most : all), count((all + size - 1) / size) {}
  int64_t begin(int64_t block) const { return block * size; }
  int64_t groups(int64_t block) const { return block + 1 < count ? size : all - block * size; }
};

// Which output pixels a strip covers: whole rows, or a part of one row.
struct StripShape {
  int64_t groups;  // most groups of a strip
  int64_t points;  // sampling points of a group
  int64_t rows, columns;  // output pixels of a strip
  int64_t strips_down, strips_across;

  StripShape(const Problem& p, int64_t group_count) : groups(group_count), points(p.points) {
    const int64_t pixels = kStripPoints / (groups * points);
    columns = pixels < 1 ? 1 : pixels < p.out_width ? pixels : p.out_width;
    rows = pixels / p.out_width;
    if (p.stride_h > 2) rows = 1;  // the rows of the image that a strip samples should follow each other
    rows = rows < 1 ? 1 : rows < p.out_height ? rows : p.out_height;
    strips_down = (p.out_height + rows - 1) / rows;
    strips_across = (p.out_width + columns - 1) / columns;
  }
  int64_t size() const { return rows * columns * groups * points; }
  int64_t count() const { return strips_down * strips_across; }
};

// Where one strip lies.
struct StripPlace {
  int64_t y, x;  // of its first output pixel
  int64_t pixels;
  int64_t first;  // index of the first pixel in the batch; the others follow it

  StripPlace(const Problem& p, const StripShape& shape, int64_t strip, int64_t image) {
    y = strip / shape.strips_across * shape.rows;
    x = strip % shape.strips_across * shape.columns;
    const int64_t rows = y + shape.rows <= p.out_height ? shape.rows : p.out_height - y;
    const int64_t columns = x + shape.columns <= p.out_width ? shape.columns : p.out_width - x;
    pixels = rows * columns;
    first = (image * p.out_height + y) * p.out_width + x;
  }
};

// Scratch for one strip: arrays over its points, in order of pixel, group and point, with room for whole vectors behind.
template <typename T>
struct Points {
  T *offset;  // 2 a point: x, y
  T *logits;
  T *factor;  // mask, or softmax(logits)
  T *kernel_x, *kernel_y, *centre_x, *centre_y;  // the regular grid of the strip at the image's upper left corner
  T *weight[4];  // bilinear share times factor: upper left, upper right, lower left, lower right
  int32_t *pixel;  // upper left corner, counted in the padded plane
  // backward only
  T *right, *below;  // shares of the right and of the lower pixels
  T *dots;  // 4 a point: <grad, corner>
  T *own;  // the factor where the point is inside the image, else 0

  // Numbers in an array: room for whole vectors behind, and for the units that `softmax` fills a block of four with.
  static int64_t padded(const StripShape& shape) { return (shape.size() + 4 * shape.points + 143) / 16 * 16; }

  static int64_t bytes(const StripShape& shape) {
    return padded(shape) * (int64_t)(20 * sizeof(T) + sizeof(int32_t)) + 64;
  }

  Points(void* scratch, const StripShape& shape) {
    const int64_t n = padded(shape);
    T* next = (T*)(((uintptr_t)scratch + 63) / 64 * 64);
    const auto take = [&next](int64_t count) {
      T* here = next;
      next += count;
      return here;
    };
    offset = take(2 * n);
    dots = take(4 * n);
    T** arrays[] = {&logits,     &factor,    &kernel_x,  &kernel_y, &centre_x, &centre_y, &weight[0],
                    &weight[1],  &weight[2], &weight[3], &right,     &below,    &own};
    for (T** array : arrays) *array = take(n);
    pixel = (int32_t*)next;
  }
};

// The regular grid of a strip at the image's upper left corner; every other strip's is shifted by whole pixels.
template <typename T>
INTERNIMAGE_NOINLINE void lay_grid(const Problem& p, const StripShape& shape, const Points<T>& s, int64_t group_count) {
  const int64_t middle_x = p.dilation_w * (p.kernel_w - 1) / 2, middle_y = p.dilation_h * (p.kernel_h - 1) / 2;
  int64_t t = 0;
  for (int64_t pixel = 0; pixel < shape.rows * shape.columns; ++pixel) {
    const T centre_x = (T)(pixel % shape.columns * p.stride_w - p.pad_w + middle_x);
    const T centre_y = (T)(pixel / shape.columns * p.stride_h - p.pad_h + middle_y);
    for (int64_t g = 0; g < group_count; ++g) {
      for (int64_t i = 0; i < p.kernel_w; ++i) {
        for (int64_t j = 0; j < p.kernel_h; ++j) {
          if (p.remove_center && i == p.kernel_w / 2 && j == p.kernel_h / 2) continue;
          s.centre_x[t] = centre_x;
          s.centre_y[t] = centre_y;
          s.kernel_x[t] = (T)(i * p.dilation_w - middle_x);
          s.kernel_y[t] = (T)(j * p.dilation_h - middle_y);
          ++t;
        }
      }
    }
  }
  for (const int64_t end = t + kLanes<T>; t < end; ++t)  // finite numbers for the rest of the last vector
    s.centre_x[t] = s.centre_y[t] = s.kernel_x[t] = s.kernel_y[t] = 0;
}

// ---- softmax

// Sums over the points of four units (a unit is one pixel's group), by whole vectors and one by one behind them.
template <typename T>
INTERNIMAGE_INLINE void sum_units(T* sum, const T* from, int64_t points) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  if (points < N) {
    V lane{};
    for (int i = 0; i < N; ++i) lane[i] = (T)i;
    const auto own = lane < broadcast<T, N>((T)points);
    const auto part = [&](int i) { return own ? load<V>(from + i * points) : V{}; };
    sum4<T, N>(sum, part(0), part(1), part(2), part(3));
  } else {
    V part[4];
    int64_t k = N;
    for (int i = 0; i < 4; ++i) part[i] = load<V>(from + i * points);
    for (; k + N <= points; k += N)
      for (int i = 0; i < 4; ++i) part[i] += load<V>(from + i * points + k);
    sum4<T, N>(sum, part[0], part[1], part[2], part[3]);
    for (; k < points; ++k)
      for (int i = 0; i < 4; ++i) sum[i] += from[i * points + k];
  }
}

// to[...] = each(value) over the points of a unit. Writes whole vectors: what it writes behind the unit's points the
// next unit's overwrite, so units come in order and `to` is not what is read.
template <typename T, typename Each>
INTERNIMAGE_INLINE void map_unit(T* to, int64_t points, Each each) {
  for (int64_t k = 0; k < points; k += kLanes<T>) store(to + k, each(k));
}

// factor <- softmax(logits) over each unit's points; changes the logits. exp(logit - c) with c = 0 where no logit of the
// unit could make exp overflow or vanish, which spares a search, and the largest logit otherwise.
template <typename T>
INTERNIMAGE_NOINLINE void softmax(const Points<T>& s, int64_t units, int64_t points) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  constexpr T kModerate = 60;
  const int64_t total = units * points;
  auto moderate = V{} == V{};
  for (int64_t t = 0; t < total; t += N) {
    const V v = load<V>(s.logits + t);  // behind the end stand zeros
    moderate &= (v < kModerate) & (v > -kModerate);
  }
  bool all_moderate = true;
  for (int i = 0; i < N; ++i) all_moderate &= moderate[i] != 0;
  if (!all_moderate) {
    for (int64_t u = 0; u < units; ++u) {
      T* of = s.logits + u * points;
      T top = of[0];
      bool own_moderate = true;
      for (int64_t k = 0; k < points; ++k) {
        top = of[k] > top ? of[k] : top;
        own_moderate &= of[k] < kModerate && of[k] > -kModerate;
      }
      for (int64_t k = 0; k < points && !own_moderate; ++k) of[k] -= top;
    }
  }
  constexpr int K = 4;
  for (int64_t t = 0; t < total; t += K * N) {
    V v[K];
    for (int k = 0; k < K; ++k) v[k] = load<V>(s.logits + t + k * N);
    exponential<N, K>(v);
    for (int k = 0; k < K; ++k) store(s.logits + t + k * N, v[k]);
  }
  // Four units at a time, and always so, also where fewer are left: a sum must not depend on where its unit stands.
  for (int64_t u = 0; u < units; u += 4) {
    T sum[4];
    sum_units(sum, s.logits + u * points, points);
    for (int i = 0; i < 4; ++i) {
      const T* of = s.logits + (u + i) * points;
      const V inverse = broadcast<T, N>((T)1 / sum[i]);
      map_unit(s.factor + (u + i) * points, points, [&](int64_t k) { return load<V>(of + k) * inverse; });
    }
  }
}

// Gradient of the logits from that of the factors, one a point: grad <- factor * (grad - sum(factor * grad)), with
// `product` for scratch.
template <typename T>
INTERNIMAGE_NOINLINE void softmax_backward(const T* factor, const T* grad, T* product, T* to, int64_t units,
                                         int64_t points) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  for (int64_t t = 0; t < units * points; t += N) store(product + t, load<V>(factor + t) * load<V>(grad + t));
  for (int64_t u = 0; u < units; u += 4) {
    T sum[4];
    sum_units(sum, product + u * points, points);
    for (int i = 0; i < 4; ++i) {
      const int64_t at = (u + i) * points;
      const V mean = broadcast<T, N>(sum[i]);
      map_unit(to + at, points, [&](int64_t k) { return load<V>(factor + at + k) * (load<V>(grad + at + k) - mean); });
    }
  }
}

// ---- reading

// `count` numbers of each of the strip's pixels, of `stride` there are, one after the other, and zeros behind them.
template <typename S, typename T>
INTERNIMAGE_NOINLINE void read_strip(T* to, const S* from, int64_t pixels, int64_t count, int64_t stride) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  if (count == stride) {
    copy_in(to, from, pixels * count);
  } else {
    // whole vectors: what is written past a pixel's numbers the next pixel's overwrite, and no more is read than what
    // the next pixel has
    const int64_t rounded = (count + N - 1) / N * N;
    for (int64_t i = 0; i < pixels; ++i, from += stride, to += count) {
      if (rounded <= stride && i + 1 < pixels) {
        for (int64_t k = 0; k < count; k += N) store(to + k, Convert<S, T, N>::load(from + k));
      } else {
        copy_in(to, from, count);
      }
    }
    to -= pixels * count;
  }
  // for the rest of the last vector of points, which has up to two numbers a point
  store(to + pixels * count, V{});
  store(to + pixels * count + N, V{});
}

// Offsets and mask of a strip and `count` groups from g0.
template <typename S, typename T>
INTERNIMAGE_NOINLINE void load_points(const Problem& p, const StripPlace& place, const Points<T>& s, const S* offset,
                                    const S* mask, int64_t g0, int64_t count) {
  const int64_t all = p.groups * p.points, from = place.first * all + g0 * p.points;
  read_strip(s.offset, offset + 2 * from, place.pixels, 2 * count * p.points, 2 * all);
  read_strip(p.softmax ? s.logits : s.factor, mask + from, place.pixels, count * p.points, all);
  if (p.softmax) softmax(s, place.pixels * count, p.points);
}

// ---- geometry

// floor(x) as a number and as an integer; |x| must fit the integer.
template <typename T, int N>
INTERNIMAGE_INLINE void split(Vector<T, N> x, Vector<T, N>& floor, Vector<typename IntOf<T>::type, N>& whole) {
  using V = Vector<T, N>;
  using I = Vector<typename IntOf<T>::type, N>;
  whole = __builtin_convertvector(x, I);
  floor = __builtin_convertvector(whole, V);
  const I above = floor > x;  // truncation went up: -1 where true
  whole += above;
  floor -= above ? V{} + 1 : V{};
}

// Rows of the image that a strip samples: [begin, end), clipped to the image.
struct RowRange {
  int64_t begin, end;
};

// Where the strip's points sample, and with what weights. A point outside has weight 0 and samples the padding's corner.
template <typename T, bool kBackward>
INTERNIMAGE_NOINLINE RowRange locate(const Problem& p, const StripPlace& place, const Points<T>& s, int64_t total,
                                   int64_t pitch) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  using Int = typename IntOf<T>::type;
  using I = Vector<Int, N>;
  const T scale = (T)p.offset_scale;
  const T shift_x = (T)(place.x * p.stride_w), shift_y = (T)(place.y * p.stride_h);
  const V width = broadcast<T, N>((T)p.width), height = broadcast<T, N>((T)p.height);
  const V zero = V{}, one = zero + 1;
  // stands for the row of a point outside, which must not widen the range of rows
  int64_t middle = place.y * p.stride_h - p.pad_h + p.dilation_h * (p.kernel_h - 1) / 2;
  middle = middle < 0 ? 0 : middle >= p.height ? p.height - 1 : middle;
  const V safe_y = broadcast<T, N>((T)middle);
  V lowest = safe_y, highest = safe_y;
  for (int64_t t = 0; t < total; t += N) {
    V dx, dy;
    load_pairs<T, N>(s.offset + 2 * t, dx, dy);
    V x = (load<V>(s.centre_x + t) + shift_x) + (load<V>(s.kernel_x + t) + dx) * scale;
    V y = (load<V>(s.centre_y + t) + shift_y) + (load<V>(s.kernel_y + t) + dy) * scale;
    const I inside = (x > (T)-1) & (x < width) & (y > (T)-1) & (y < height);  // false for NaN
    x = inside ? x : zero;
    y = inside ? y : safe_y;
    V floor_x, floor_y;
    I whole_x, whole_y;
    split<T, N>(x, floor_x, whole_x);
    split<T, N>(y, floor_y, whole_y);
    lowest = floor_y < lowest ? floor_y : lowest;
    highest = floor_y > highest ? floor_y : highest;
    const I pixel = (whole_y + 2) * (Int)pitch + (whole_x + 2);
    store(s.pixel + t, __builtin_convertvector(inside ? pixel : I{}, Vector<int32_t, N>));
    const V factor = inside ? load<V>(s.factor + t) : zero;
    const V right = x - floor_x, below = y - floor_y, left = one - right;
    const V upper = (one - below) * factor, lower = below * factor;
    store(s.weight[0] + t, left * upper);
    store(s.weight[1] + t, right * upper);
    store(s.weight[2] + t, left * lower);
    store(s.weight[3] + t, right * lower);
    if (kBackward) {
      store(s.right + t, right);
      store(s.below + t, below);
      store(s.own + t, factor);
    }
  }
  T low = lowest[0], high = highest[0];
  for (int i = 1; i < N; ++i) {
    low = lowest[i] < low ? lowest[i] : low;
    high = highest[i] > high ? highest[i] : high;
  }
  const int64_t begin = (int64_t)low, end = (int64_t)high + 2;
  return {begin < 0 ? 0 : begin, end > p.height ? p.height : end};
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
