// SPDX-License-Identifier: MIT
// The DCNv3 kernels of one instruction set.
//
// Included once by each dcnv3_<isa>.cpp, which sets the compiler's target and defines INTERNIMAGE_ISA (a namespace),
// INTERNIMAGE_BUILD and INTERNIMAGE_NAME (the table at the end), and INTERNIMAGE_VECTOR_BYTES; no include guard. Vectors are the compiler's own (GCC and Clang), not intrinsics, so
// the same text serves every processor. Nothing of the C++ library may be instantiated here: its code would be
// compiled for this instruction set, and the linker could keep that copy for all.
//
// Work is cut into strips of some 1000 sampling points, for which everything fits the first-level cache:
//   1. `load_points`     offsets and mask of the strip to the compute type, softmax;
//   2. `locate`          vectorised over points: where each samples, the weights of its four corners;
//   3. `gather` (forward) or `scatter` (backward), vectorised over channels;
//   4. `finish` (backward), vectorised over points: gradients of offset and mask from four dot products a point.

namespace internimage {
namespace INTERNIMAGE_ISA {

constexpr int64_t kStripPoints = 1024;
constexpr int64_t kCacheBytes = 28 * 1024;  // of the first-level cache, for rows of the image

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vector = typename VectorOf<T, N>::type;

template <typename T>
constexpr int kLanes = INTERNIMAGE_VECTOR_BYTES / sizeof(T);

template <typename T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

template <typename V>
inline __attribute__((always_inline)) V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <typename V>
inline __attribute__((always_inline)) void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// bfloat16 in memory. A type of its own, so that uint16_t is never mistaken for it.
struct Bf16 {
  uint16_t bits;
};

// Storage S <-> compute type T, N lanes at a time.
template <typename S, typename T, int N>
struct Convert {
  static inline __attribute__((always_inline)) Vector<T, N> load(const S* from) {
    return INTERNIMAGE_ISA::load<Vector<T, N>>(from);
  }
  static inline __attribute__((always_inline)) void store(S* to, Vector<T, N> v) { INTERNIMAGE_ISA::store(to, v); }
};

template <int N>
struct Convert<Bf16, float, N> {
  static inline __attribute__((always_inline)) Vector<float, N> load(const Bf16* from) {
    const auto half = INTERNIMAGE_ISA::load<Vector<uint16_t, N>>(from);
    const Vector<uint32_t, N> bits = __builtin_convertvector(half, Vector<uint32_t, N>) << 16;
    return (Vector<float, N>)bits;
  }
  static inline __attribute__((always_inline)) void store(Bf16* to, Vector<float, N> v) {
    Vector<uint32_t, N> bits = (Vector<uint32_t, N>)v;
    const Vector<uint32_t, N> nearest_even = bits + 0x7fff + ((bits >> 16) & 1);
    bits = (v == v) ? nearest_even : (bits | 0x400000);  // a NaN must not round to infinity
    INTERNIMAGE_ISA::store(to, __builtin_convertvector(bits >> 16, Vector<uint16_t, N>));
  }
};

template <typename S, typename T>
inline T load_one(const S* from) {
  return Convert<S, T, 1>::load(from)[0];
}
template <typename S, typename T>
inline void store_one(S* to, T value) {
  const Vector<T, 1> v = {value};
  Convert<S, T, 1>::store(to, v);
}

template <typename S, typename T>
inline void copy_in(T* to, const S* from, int64_t n) {
  constexpr int N = kLanes<T>;
  int64_t i = 0;
  for (; i + N <= n; i += N) store(to + i, Convert<S, T, N>::load(from + i));
  for (; i < n; ++i) to[i] = load_one<S, T>(from + i);
}

template <typename S, typename T>
inline void copy_out(S* to, const T* from, int64_t n) {
  constexpr int N = kLanes<T>;
  int64_t i = 0;
  for (; i + N <= n; i += N) Convert<S, T, N>::store(to + i, load<Vector<T, N>>(from + i));
  for (; i < n; ++i) store_one<S, T>(to + i, from[i]);
}

// ---- shuffles

// The N lanes of a and b (0 to 2N - 1) that `lane(i)` names. Everything folds to constants.
template <typename V, int N, typename Lane>
inline __attribute__((always_inline)) V shuffle(V a, V b, Lane lane) {
#if defined(__clang__)
  V result;
  for (int i = 0; i < N; ++i) result[i] = lane(i) < N ? a[lane(i)] : b[lane(i) - N];
  return result;
#else
  typedef decltype(a < b) I;  // a vector of integers of the same width
  I lanes{};
  for (int i = 0; i < N; ++i) lanes[i] = lane(i);
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Four planar vectors -> 4 values a lane in memory.
template <typename T, int N>
inline __attribute__((always_inline)) void store_interleaved(T* to, Vector<T, N> a, Vector<T, N> b, Vector<T, N> c,
                                                             Vector<T, N> d) {
  using V = Vector<T, N>;
  if constexpr (N < 4) {
    for (int i = 0; i < N; ++i) {
      to[4 * i] = a[i];
      to[4 * i + 1] = b[i];
      to[4 * i + 2] = c[i];
      to[4 * i + 3] = d[i];
    }
  } else {
    const auto low = [](int i) { return i / 2 + i % 2 * N; };
    const auto high = [](int i) { return N / 2 + i / 2 + i % 2 * N; };
    const auto low2 = [](int i) { return i / 4 * 2 + i % 2 + i / 2 % 2 * N; };
    const auto high2 = [](int i) { return N / 2 + i / 4 * 2 + i % 2 + i / 2 % 2 * N; };
    const V ab0 = shuffle<V, N>(a, b, low), ab1 = shuffle<V, N>(a, b, high);
    const V cd0 = shuffle<V, N>(c, d, low), cd1 = shuffle<V, N>(c, d, high);
    store(to, shuffle<V, N>(ab0, cd0, low2));
    store(to + N, shuffle<V, N>(ab0, cd0, high2));
    store(to + 2 * N, shuffle<V, N>(ab1, cd1, low2));
    store(to + 3 * N, shuffle<V, N>(ab1, cd1, high2));
  }
}

// The inverse of `store_interleaved`.
template <typename T, int N>
inline __attribute__((always_inline)) void load_interleaved(const T* from, Vector<T, N>& a, Vector<T, N>& b,
                                                            Vector<T, N>& c, Vector<T, N>& d) {
  using V = Vector<T, N>;
  if constexpr (N < 4) {
    for (int i = 0; i < N; ++i) {
      a[i] = from[4 * i];
      b[i] = from[4 * i + 1];
      c[i] = from[4 * i + 2];
      d[i] = from[4 * i + 3];
    }
  } else {
    const auto even = [](int i) { return 2 * i; };
    const auto odd = [](int i) { return 2 * i + 1; };
    const V p = load<V>(from), q = load<V>(from + N), r = load<V>(from + 2 * N), s = load<V>(from + 3 * N);
    const V ac0 = shuffle<V, N>(p, q, even), ac1 = shuffle<V, N>(r, s, even);
    const V bd0 = shuffle<V, N>(p, q, odd), bd1 = shuffle<V, N>(r, s, odd);
    a = shuffle<V, N>(ac0, ac1, even);
    c = shuffle<V, N>(ac0, ac1, odd);
    b = shuffle<V, N>(bd0, bd1, even);
    d = shuffle<V, N>(bd0, bd1, odd);
  }
}

struct Add {
  template <typename V>
  static inline __attribute__((always_inline)) V apply(V a, V b) {
    return a + b;
  }
};
struct Max {
  template <typename V>
  static inline __attribute__((always_inline)) V apply(V a, V b) {
    return a > b ? a : b;
  }
};

template <typename Op, typename T, int N>
inline __attribute__((always_inline)) T reduce(Vector<T, N> v) {
  T result = v[0];
  for (int i = 1; i < N; ++i) result = Op::apply(result, v[i]);
  return result;
}

// Four vectors -> to[0..3], each reduced over its lanes.
template <typename Op, typename T, int N>
inline __attribute__((always_inline)) void reduce4(T* to, Vector<T, N> v0, Vector<T, N> v1, Vector<T, N> v2,
                                                   Vector<T, N> v3) {
  using V = Vector<T, N>;
  if constexpr (N < 4) {
    to[0] = reduce<Op, T, N>(v0);
    to[1] = reduce<Op, T, N>(v1);
    to[2] = reduce<Op, T, N>(v2);
    to[3] = reduce<Op, T, N>(v3);
  } else {
    constexpr int H = N / 2, Q = N / 4;
    const auto first = [](int i) { return i % H + i / H * N; };  // the first halves of both vectors
    const auto second = [](int i) { return H + i % H + i / H * N; };
    const V s01 = Op::apply(shuffle<V, N>(v0, v1, first), shuffle<V, N>(v0, v1, second));
    const V s23 = Op::apply(shuffle<V, N>(v2, v3, first), shuffle<V, N>(v2, v3, second));
    const auto first_q = [](int i) { return i % Q + i / Q * H; };  // the first halves of all four halves
    const auto second_q = [](int i) { return Q + i % Q + i / Q * H; };
    V s = Op::apply(shuffle<V, N>(s01, s23, first_q), shuffle<V, N>(s01, s23, second_q));
    if constexpr (Q >= 4) s = Op::apply(s, shuffle<V, N>(s, s, [](int i) { return i ^ 2; }));
    if constexpr (Q >= 2) {
      s = Op::apply(s, shuffle<V, N>(s, s, [](int i) { return i ^ 1; }));
      s = shuffle<V, N>(s, s, [](int i) { return i < 4 ? i * (N / 4) : i; });
    }
    static_assert(Q <= 4, "one more step for wider vectors");
    __builtin_memcpy(to, &s, 4 * sizeof(T));
  }
}

// ---- strips

// Scratch for one strip: arrays over points, padded to whole vectors. Planar, but for those with 4 a point.
template <typename T>
struct Strip {
  T *offset, *logits, *factor, *inverse;  // offset has 2 a point; inverse has 1 a group: what softmax still divides by
  T *kernel_x, *kernel_y, *centre_x;  // geometry of each point; the same for every row
  T* weights;  // 4 a point: upper left, upper right, lower left, lower right
  int32_t* places;  // 4 a point: y * width + x of the upper left corner (-1 for a point outside), the steps in elements
                    // to the right and to the lower corner (0 at a border), and nothing
  // backward only
  T* dots;  // 4 a point: <grad, corner>
  T *left, *right, *above, *below;  // shares of the two columns and the two rows
  T *from_left, *from_right, *from_above, *from_below;  // which of them exist: 1 or 0
};

// Room behind the last point for whole vectors, and for three groups more (`exponentiate`).
inline int64_t padded(int64_t points) { return (points + 15) / 16 * 16 + 80; }

// Bytes of scratch that `carve` needs for strips of `points` points.
template <typename T>
inline int64_t strip_bytes(int64_t points) {
  return padded(points) * (int64_t)(24 * sizeof(T) + 4 * sizeof(int32_t)) + 64;
}

template <typename T>
inline Strip<T> carve(void* scratch, int64_t points) {
  const int64_t n = padded(points);
  T* next = (T*)(((uintptr_t)scratch + 63) / 64 * 64);
  const auto take = [&next](int64_t count) {
    T* here = next;
    next += count;
    return here;
  };
  Strip<T> s;
  s.weights = take(4 * n);
  s.dots = take(4 * n);
  s.offset = take(2 * n);
  T** arrays[] = {&s.logits,    &s.factor,     &s.inverse,    &s.kernel_x,   &s.kernel_y,  &s.centre_x, &s.left, &s.right, &s.above,
                  &s.below,     &s.from_left,  &s.from_right, &s.from_above, &s.from_below};
  for (T** array : arrays) *array = take(n);
  s.places = (int32_t*)next;
  return s;
}

// The regular grid of a strip that starts at column 0; another strip's is shifted by its column times the stride.
template <typename T>
inline void lay_grid(const Problem& p, const Strip<T>& s, int64_t pixels, int64_t group_count) {
  const int64_t middle_x = p.dilation_w * (p.kernel_w - 1) / 2, middle_y = p.dilation_h * (p.kernel_h - 1) / 2;
  int64_t t = 0;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const T centre = (T)(pixel * p.stride_w - p.pad_w + middle_x);
    for (int64_t g = 0; g < group_count; ++g) {
      for (int64_t i = 0; i < p.kernel_w; ++i) {
        for (int64_t j = 0; j < p.kernel_h; ++j) {
          if (p.remove_center && i == p.kernel_w / 2 && j == p.kernel_h / 2) continue;
          s.centre_x[t] = centre;
          s.kernel_x[t] = (T)(i * p.dilation_w - middle_x);
          s.kernel_y[t] = (T)(j * p.dilation_h - middle_y);
          ++t;
        }
      }
    }
  }
}

template <typename T, int N>
inline __attribute__((always_inline)) Vector<T, N> broadcast(T value) {
  return value - Vector<T, N>{};
}

// exp for x <= 0, to about one unit in the last place in float (Cephes' polynomial); below -87 the result is 0.
template <int N>
inline __attribute__((always_inline)) Vector<float, N> exp_negative(Vector<float, N> x) {
  using F = Vector<float, N>;
  using I = Vector<int32_t, N>;
  const auto gone = x < -87.0f;
  const auto nan = x != x;
  const F y = (gone | nan) ? F{} : x;
  const I n = __builtin_convertvector(y * 1.44269504088896341f - 0.5f, I);  // y <= 0: truncation rounds
  const F k = __builtin_convertvector(n, F);
  const F r = (y - k * 0.693359375f) + k * 2.12194440e-4f;
  F e = broadcast<float, N>(1.9875691500e-4f);
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * (r * r) + r + 1.0f;
  e = e * (F)((n + 127) << 23);
  e = gone ? F{} : e;
  return nan ? x : e;
}

template <int N>
inline __attribute__((always_inline)) Vector<double, N> exp_negative(Vector<double, N> x) {
  for (int i = 0; i < N; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// factor <- exp(logit - the group's largest), inverse <- 1 / their sum. The logits stand in `s.logits` and not in place:
// a load that overlaps a store just made would wait for it.
template <typename T>
inline void exponentiate(const Strip<T>& s, int64_t group_count, int64_t points) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  const int64_t total = group_count * points;
  V lane{};
  for (int i = 0; i < N; ++i) lane[i] = (T)i;
  const auto own = lane < broadcast<T, N>((T)points);  // the lanes of a load at a group's start that are the group's
  // Four groups at a time, and always so, also where fewer are left: a sum must not depend on where its group stands.
  const bool by_vectors = points <= N;
  if (by_vectors) {
    const V lowest = broadcast<T, N>(-__builtin_inf());
    for (int64_t g = 0; g < group_count; g += 4) {
      T top[4];
      const T* from = s.logits + g * points;
      T* to = s.factor + g * points;
      const V v0 = load<V>(from), v1 = load<V>(from + points), v2 = load<V>(from + 2 * points),
              v3 = load<V>(from + 3 * points);
      reduce4<Max, T, N>(top, own ? v0 : lowest, own ? v1 : lowest, own ? v2 : lowest, own ? v3 : lowest);
      store(to, v0 - top[0]);  // in this order: each overwrites what the one before wrote past its group
      store(to + points, v1 - top[1]);
      store(to + 2 * points, v2 - top[2]);
      store(to + 3 * points, v3 - top[3]);
    }
  }
  for (int64_t g = 0; !by_vectors && g < group_count; ++g) {
    const T* from = s.logits + g * points;
    T* to = s.factor + g * points;
    T top = from[0];
    for (int64_t k = 1; k < points; ++k) top = from[k] > top ? from[k] : top;
    for (int64_t k = 0; k < points; ++k) to[k] = from[k] - top;
  }
  for (int64_t t = 0; t < total; t += N) store(s.factor + t, exp_negative<N>(load<V>(s.factor + t)));
  if (by_vectors) {
    for (int64_t g = 0; g < group_count; g += 4) {
      T sum[4];
      const T* f = s.factor + g * points;
      const auto own_part = [&](int i) { return own ? load<V>(f + i * points) : V{}; };
      reduce4<Add, T, N>(sum, own_part(0), own_part(1), own_part(2), own_part(3));
      for (int i = 0; i < 4; ++i) s.inverse[g + i] = (T)1 / sum[i];
    }
  }
  for (int64_t g = 0; !by_vectors && g < group_count; ++g) {
    const T* f = s.factor + g * points;
    T sum = f[0];
    for (int64_t k = 1; k < points; ++k) sum += f[k];
    s.inverse[g] = (T)1 / sum;
  }
}

// Offsets and mask of `pixels` output pixels and the groups g0 to g1; `row` is the first pixel's index in the batch.
template <typename S, typename T>
inline void load_points(const Problem& p, const Strip<T>& s, const S* offset, const S* mask, int64_t row, int64_t pixels,
                        int64_t g0, int64_t g1) {
  const int64_t all = p.groups * p.points, count = (g1 - g0) * p.points;
  T* factor = p.softmax ? s.logits : s.factor;
  if (g1 - g0 == p.groups) {
    copy_in(s.offset, offset + row * all * 2, pixels * all * 2);
    copy_in(factor, mask + row * all, pixels * all);
  } else {
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t from = (row + i) * all + g0 * p.points;
      copy_in(s.offset + i * count * 2, offset + from * 2, count * 2);
      copy_in(factor + i * count, mask + from, count);
    }
  }
  if (p.softmax) exponentiate(s, pixels * (g1 - g0), p.points);
}

template <typename T, int N>
struct Axis {
  Vector<T, N> first, second;  // shares of the two pixels; at a border both are half of the one pixel's share
  Vector<T, N> has_first, has_second;
  Vector<typename IntOf<T>::type, N> start;  // the first pixel, inside the image
  Vector<typename IntOf<T>::type, N> both;  // -1 where there are two pixels, 0 at a border
};

// Linear interpolation along one axis at x in (-1, size). A border has one pixel only: both corners then stand for it with
// half its share each, which is exact, needs no branch, and lets no other pixel (an infinity, say) into the sum.
template <typename T, int N>
inline __attribute__((always_inline)) Axis<T, N> interpolate(Vector<T, N> x, T size) {
  using V = Vector<T, N>;
  using I = Vector<typename IntOf<T>::type, N>;
  I whole = __builtin_convertvector(x, I);
  V floor = __builtin_convertvector(whole, V);
  const I above = floor > x;  // truncation went up, for x in (-1, 0): -1 where true
  whole += above;
  floor = __builtin_convertvector(whole, V);
  const V share = x - floor;
  const V zero = V{}, one = zero + 1;
  const I low = floor < zero, high = floor >= broadcast<T, N>(size - 1);
  Axis<T, N> axis;
  const V at_border = (low ? share : one - share) * (T)0.5;
  const I border = low | high;
  axis.first = border ? at_border : one - share;
  axis.second = border ? at_border : share;
  axis.has_first = low ? zero : one;
  axis.has_second = high ? zero : one;
  axis.start = low ? I{} : whole;
  axis.both = ~border;
  return axis;
}

// Where the strip's points sample, and with what weights.
template <typename T, bool kBackward>
inline void locate(const Problem& p, const Strip<T>& s, int64_t oy, int64_t ox, int64_t total) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  using I = Vector<typename IntOf<T>::type, N>;
  const int64_t middle_y = p.dilation_h * (p.kernel_h - 1) / 2;
  const T centre_y = (T)(oy * p.stride_h - p.pad_h + middle_y);
  const T scale = (T)p.offset_scale, shift = (T)(ox * p.stride_w);
  const V width = broadcast<T, N>((T)p.width), height = broadcast<T, N>((T)p.height), zero = V{};
  for (int64_t t = 0; t < total; t += N) {
    const V first = load<V>(s.offset + 2 * t), second = load<V>(s.offset + 2 * t + N);
    const V dx = shuffle<V, N>(first, second, [](int i) { return 2 * i; });
    const V dy = shuffle<V, N>(first, second, [](int i) { return 2 * i + 1; });
    V x = load<V>(s.centre_x + t) + shift + (load<V>(s.kernel_x + t) + dx) * scale;
    V y = centre_y + (load<V>(s.kernel_y + t) + dy) * scale;
    const I inside = (x > (T)-1) & (x < width) & (y > (T)-1) & (y < height);  // false for NaN
    x = inside ? x : zero;
    y = inside ? y : zero;
    const auto ax = interpolate<T, N>(x, (T)p.width), ay = interpolate<T, N>(y, (T)p.height);
    const I pixel = ay.start * (typename IntOf<T>::type)p.width + ax.start;
    using Place = Vector<int32_t, N>;
    const auto place = [](I v) { return __builtin_convertvector(v, Place); };
    store_interleaved<int32_t, N>(s.places + 4 * t, place(inside ? pixel : ~I{}),
                                  place(ax.both & inside & (typename IntOf<T>::type)p.channels),
                                  place(ay.both & inside & (typename IntOf<T>::type)(p.channels * p.width)), Place{});
    const V factor = inside ? load<V>(s.factor + t) : zero;
    const V top = ay.first * factor, bottom = ay.second * factor;
    store_interleaved<T, N>(s.weights + 4 * t, ax.first * top, ax.second * top, ax.first * bottom, ax.second * bottom);
    if (kBackward) {
      const V in = inside ? zero + 1 : zero;
      store(s.left + t, ax.first * in);
      store(s.right + t, ax.second * in);
      store(s.above + t, ay.first * in);
      store(s.below + t, ay.second * in);
      store(s.from_left + t, ax.has_first * in);
      store(s.from_right + t, ax.has_second * in);
      store(s.from_above + t, ay.has_first * in);
      store(s.from_below + t, ay.has_second * in);
    }
  }
}

// The upper left corner of a point. Without a branch: near borders it could not be predicted.
template <typename P>
inline __attribute__((always_inline)) P* corner(P* image, P* outside, int64_t pixel, int64_t channels) {
  const int64_t is_outside = pixel >> 63;
  const uintptr_t inside_at = (uintptr_t)(image + pixel * channels), outside_at = (uintptr_t)outside;
  return (P*)((inside_at & ~is_outside) | (outside_at & is_outside));
}

// ---- forward

// Weighted sum of the corners of a group's points, for M vectors of N channels. kPoints is their number, or 0.
template <typename S, typename T, int N, int M, int kPoints>
inline __attribute__((always_inline)) void gather_block(const Strip<T>& s, int64_t t, int64_t points, const S* image,
                                                        const S* zeros, int64_t channels, T scale, S* out) {
  using V = Vector<T, N>;
  using C = Convert<S, T, N>;
  // one sum a corner where registers allow, since each waits for its own last addition
  constexpr int kSums = M <= 2 ? 4 : 2;
  V sum[kSums][M];
  for (int i = 0; i < kSums; ++i)
    for (int m = 0; m < M; ++m) sum[i][m] = V{};
  const T* w = s.weights + 4 * t;
  const int32_t* place = s.places + 4 * t;
  const auto point = [&](int64_t k) __attribute__((always_inline)) {
    const S* c00 = corner(image, zeros, place[4 * k], channels);
    const int64_t step_x = place[4 * k + 1];
    const S* c10 = c00 + place[4 * k + 2];
    for (int m = 0; m < M; ++m) {
      sum[0][m] += C::load(c00 + m * N) * w[4 * k];
      sum[1][m] += C::load(c00 + step_x + m * N) * w[4 * k + 1];
      sum[2 % kSums][m] += C::load(c10 + m * N) * w[4 * k + 2];
      sum[3 % kSums][m] += C::load(c10 + step_x + m * N) * w[4 * k + 3];
    }
  };
  if constexpr (kPoints > 0) {
#pragma GCC unroll 9
    for (int64_t k = 0; k < kPoints; ++k) point(k);
  } else {
    for (int64_t k = 0; k < points; ++k) point(k);
  }
  for (int m = 0; m < M; ++m) {
    V all = sum[0][m] + sum[1][m];
    if constexpr (kSums == 4) all += sum[2][m] + sum[3][m];
    C::store(out + m * N, all * scale);
  }
}

// All channels of a group: whole vectors first, then halves, down to single channels.
template <typename S, typename T, int N, int kPoints>
inline __attribute__((always_inline)) void gather(const Strip<T>& s, int64_t t, int64_t points, const S* image,
                                                  const S* zeros, int64_t channels, int64_t width, T scale, S* out) {
  int64_t c = 0;
  if constexpr (N == kLanes<T> && N < 16) {
    constexpr int M = 16 / N;
    for (; c + 16 <= width; c += 16)
      gather_block<S, T, N, M, kPoints>(s, t, points, image + c, zeros, channels, scale, out + c);
  }
  for (; c + N <= width; c += N)
    gather_block<S, T, N, 1, kPoints>(s, t, points, image + c, zeros, channels, scale, out + c);
  if constexpr (N > 1) {
    if (c < width) gather<S, T, N / 2, 0>(s, t, points, image + c, zeros, channels, width - c, scale, out + c);
  }
}

inline int64_t pixels_a_strip(const Problem& p, int64_t group_count) {
  const int64_t pixels = kStripPoints / (group_count * p.points);
  return pixels < 1 ? 1 : pixels > p.out_width ? p.out_width : pixels;
}

// How many groups to take at once, so that the rows around an output row stay in the first-level cache: `value_bytes`
// bytes a channel, of all that is read and written there.
inline int64_t groups_a_block(const Problem& p, int64_t value_bytes) {
  const int64_t rows = p.kernel_h * p.dilation_h + 4 < p.height ? p.kernel_h * p.dilation_h + 4 : p.height;
  const int64_t group_bytes = rows * p.width * p.group_channels * value_bytes;
  const int64_t count = kCacheBytes / (group_bytes + 1);
  return count < 1 ? 1 : count > p.groups ? p.groups : count;
}

// Output rows [begin, end) of one image, and the groups [g0, g1).
template <typename S, typename T, int kPoints>
inline void forward_block(const Problem& p, const Strip<T>& s, int64_t strip, const S* image, const S* offset,
                          const S* mask, S* output, const S* zeros, int64_t begin, int64_t end, int64_t g0, int64_t g1) {
  const int64_t count = g1 - g0;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t ox = 0; ox < p.out_width; ox += strip) {
      const int64_t pixels = ox + strip <= p.out_width ? strip : p.out_width - ox;
      const int64_t first = row * p.out_width + ox;
      load_points(p, s, offset, mask, first, pixels, g0, g1);
      locate<T, false>(p, s, row % p.out_height, ox, pixels * count * p.points);
      const T* inverse = s.inverse;
      int64_t t = 0;
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        for (int64_t g = g0; g < g1; ++g) {
          const T scale = p.softmax ? *inverse++ : (T)1;
          const int64_t c = g * p.group_channels;
          gather<S, T, kLanes<T>, kPoints>(s, t, p.points, image + c, zeros, p.channels, p.group_channels, scale,
                                           output + (first + pixel) * p.channels + c);
          t += p.points;
        }
      }
    }
  }
}

// Output rows [begin, end) of the batch's batch * out_height.
template <typename S, typename T, int kPoints>
void forward_rows(const Problem& p, const S* input, const S* offset, const S* mask, S* output, const S* zeros,
                  void* scratch, int64_t begin, int64_t end) {
  const int64_t block = groups_a_block(p, sizeof(S));
  const int64_t strip = pixels_a_strip(p, block);
  const Strip<T> s = carve<T>(scratch, strip * block * p.points);
  const int64_t image_size = p.height * p.width * p.channels;
  while (begin < end) {
    const int64_t n = begin / p.out_height;
    const int64_t stop = end < (n + 1) * p.out_height ? end : (n + 1) * p.out_height;
    for (int64_t g0 = 0; g0 < p.groups; g0 += block) {
      const int64_t g1 = g0 + block < p.groups ? g0 + block : p.groups;
      lay_grid(p, s, strip, g1 - g0);
      forward_block<S, T, kPoints>(p, s, strip, input + n * image_size, offset, mask, output, zeros, begin, stop, g0, g1);
    }
    begin = stop;
  }
}

template <typename S, typename T>
void forward(const Problem& p, const S* input, const S* offset, const S* mask, S* output, const S* zeros, void* scratch,
             int64_t begin, int64_t end) {
  const auto rows = p.points == 9 ? forward_rows<S, T, 9> : p.points == 8 ? forward_rows<S, T, 8> : forward_rows<S, T, 0>;
  rows(p, input, offset, mask, output, zeros, scratch, begin, end);
}

// ---- backward

// For M vectors of N channels of one group: adds to the four rows of grad_input (one after the other: at a border two of
// them are the same), and to the four dot products, or sets them with kFirst.
template <typename S, typename T, int N, int M, bool kInput, bool kDots, bool kFirst>
inline __attribute__((always_inline)) void scatter_block(const Strip<T>& s, int64_t t, int64_t points, const S* image,
                                                         const S* zeros, T* grad_image, T* sink, int64_t channels,
                                                         const S* grad) {
  using V = Vector<T, N>;
  using C = Convert<S, T, N>;
  V g[M];
  for (int m = 0; m < M; ++m) g[m] = C::load(grad + m * N);
  for (int64_t k = t; k < t + points; ++k) {
    const int64_t pixel = s.places[4 * k], step_x = s.places[4 * k + 1], step_y = s.places[4 * k + 2];
    if constexpr (kDots) {
      const S* c00 = corner(image, zeros, pixel, channels);
      const S* c10 = c00 + step_y;
      V d00 = C::load(c00) * g[0], d01 = C::load(c00 + step_x) * g[0];
      V d10 = C::load(c10) * g[0], d11 = C::load(c10 + step_x) * g[0];
      for (int m = 1; m < M; ++m) {
        d00 += C::load(c00 + m * N) * g[m];
        d01 += C::load(c00 + step_x + m * N) * g[m];
        d10 += C::load(c10 + m * N) * g[m];
        d11 += C::load(c10 + step_x + m * N) * g[m];
      }
      if constexpr (kFirst) {
        reduce4<Add, T, N>(s.dots + 4 * k, d00, d01, d10, d11);
      } else {
        T dots[4];
        reduce4<Add, T, N>(dots, d00, d01, d10, d11);
        for (int i = 0; i < 4; ++i) s.dots[4 * k + i] += dots[i];
      }
    }
    if constexpr (kInput) {
      T* r00 = corner(grad_image, sink, pixel, channels);
      const auto add = [&](T* row, T weight) __attribute__((always_inline)) {
        for (int m = 0; m < M; ++m) store(row + m * N, load<V>(row + m * N) + g[m] * weight);
      };
      add(r00, s.weights[4 * k]);
      add(r00 + step_x, s.weights[4 * k + 1]);
      add(r00 + step_y, s.weights[4 * k + 2]);
      add(r00 + step_x + step_y, s.weights[4 * k + 3]);
    }
  }
}

// All channels of a group, in blocks as wide as they can be.
template <typename S, typename T, int N, bool kInput, bool kDots, bool kFirst>
inline __attribute__((always_inline)) void scatter(const Strip<T>& s, int64_t t, int64_t points, const S* image,
                                                   const S* zeros, T* grad_image, T* sink, int64_t channels,
                                                   int64_t width, const S* grad) {
  constexpr int M = N == kLanes<T> && N < 16 ? 16 / N : 1;
  if (width >= M * N) {
    scatter_block<S, T, N, M, kInput, kDots, kFirst>(s, t, points, image, zeros, grad_image, sink, channels, grad);
    for (int64_t c = M * N; c < width;) {
      if (c + M * N <= width) {
        scatter_block<S, T, N, M, kInput, kDots, false>(s, t, points, image + c, zeros, grad_image + c, sink, channels,
                                                        grad + c);
        c += M * N;
      } else {
        if constexpr (N > 1)
          scatter<S, T, N / 2, kInput, kDots, false>(s, t, points, image + c, zeros, grad_image + c, sink, channels,
                                                     width - c, grad + c);
        break;
      }
    }
  } else if constexpr (N > 1) {
    scatter<S, T, N / 2, kInput, kDots, kFirst>(s, t, points, image, zeros, grad_image, sink, channels, width, grad);
  }
}

// Dot products -> gradients of offset (into s.offset) and of mask (into s.dots, one a point), before the softmax.
template <typename T>
inline void finish(const Problem& p, const Strip<T>& s, int64_t total) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  const T scale = (T)p.offset_scale;
  for (int64_t t = 0; t < total; t += N) {
    V d00, d01, d10, d11;
    load_interleaved<T, N>(s.dots + 4 * t, d00, d01, d10, d11);
    const V left = load<V>(s.left + t), right = load<V>(s.right + t);
    const V above = load<V>(s.above + t), below = load<V>(s.below + t);
    const V factor = (left + right > V{}) ? load<V>(s.factor + t) * scale : V{};  // a mask of NaN outside is not used
    const V column0 = above * d00 + below * d10, column1 = above * d01 + below * d11;
    const V row0 = left * d00 + right * d01, row1 = left * d10 + right * d11;
    const V grad_x = factor * (column1 * load<V>(s.from_right + t) - column0 * load<V>(s.from_left + t));
    const V grad_y = factor * (row1 * load<V>(s.from_below + t) - row0 * load<V>(s.from_above + t));
    store(s.offset + 2 * t, shuffle<V, N>(grad_x, grad_y, [](int i) { return i / 2 + i % 2 * N; }));
    store(s.offset + 2 * t + N, shuffle<V, N>(grad_x, grad_y, [](int i) { return N / 2 + i / 2 + i % 2 * N; }));
    store(s.dots + t, above * row0 + below * row1);  // behind what has been read: 1 a point for 4
  }
}

template <typename S, typename T, bool kInput, bool kDots>
inline void backward_block(const Problem& p, const S* grad_output, const S* input, const S* offset, const S* mask,
                           T* grad_input, S* grad_offset, S* grad_mask, const S* zeros, void* scratch, int64_t n,
                           int64_t g0, int64_t g1) {
  const int64_t count = g1 - g0;
  const int64_t strip = pixels_a_strip(p, count);
  const Strip<T> s = carve<T>(scratch, strip * count * p.points);
  T* sink = (T*)((char*)scratch + strip_bytes<T>(strip * count * p.points));
  const int64_t image_size = p.height * p.width * p.channels, all = p.groups * p.points;
  const int64_t first_channel = g0 * p.group_channels;
  const S* image = input + n * image_size + first_channel;
  T* grad_image = grad_input + n * image_size + first_channel;
  lay_grid(p, s, strip, count);
  for (int64_t oy = 0; oy < p.out_height; ++oy) {
    for (int64_t ox = 0; ox < p.out_width; ox += strip) {
      const int64_t pixels = ox + strip <= p.out_width ? strip : p.out_width - ox;
      const int64_t row = (n * p.out_height + oy) * p.out_width + ox;
      const int64_t total = pixels * count * p.points;
      load_points(p, s, offset, mask, row, pixels, g0, g1);
      if (p.softmax) {
        for (int64_t i = 0; i < pixels * count; ++i)
          for (int64_t k = 0; k < p.points; ++k) s.factor[i * p.points + k] *= s.inverse[i];
      }
      locate<T, true>(p, s, oy, ox, total);
      int64_t t = 0;
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        const S* grad = grad_output + (row + pixel) * p.channels + first_channel;
        for (int64_t g = 0; g < count; ++g) {
          const int64_t c = g * p.group_channels;
          scatter<S, T, kLanes<T>, kInput, kDots, true>(s, t, p.points, image + c, zeros, grad_image + c, sink, p.channels,
                                                  p.group_channels, grad + c);
          t += p.points;
        }
      }
      if (!kDots) continue;
      finish(p, s, total);
      if (p.softmax) {
        for (int64_t i = 0; i < pixels * count; ++i) {
          const T* f = s.factor + i * p.points;
          T* d = s.dots + i * p.points;
          T mean = 0;
          for (int64_t k = 0; k < p.points; ++k) mean += f[k] * d[k];
          for (int64_t k = 0; k < p.points; ++k) d[k] = f[k] * (d[k] - mean);
        }
      }
      const int64_t width = count * p.points;
      for (int64_t i = 0; i < pixels; ++i) {
        const int64_t to = (row + i) * all + g0 * p.points;
        copy_out(grad_offset + to * 2, s.offset + i * width * 2, width * 2);
        copy_out(grad_mask + to, s.dots + i * width, width);
      }
    }
  }
}

// Gradients of image `n` and the groups [g0, g1). No two such tasks write to the same place, so there are no atomics, and
// the order of the sums does not depend on how tasks are spread over threads. grad_input holds zeros.
template <typename S, typename T, bool kInput, bool kDots>
inline void backward_task(const Problem& p, const S* grad_output, const S* input, const S* offset, const S* mask,
                          T* grad_input, S* grad_offset, S* grad_mask, const S* zeros, void* scratch, int64_t n,
                          int64_t g0, int64_t g1) {
  const int64_t block = groups_a_block(p, (kDots ? sizeof(S) : 0) + (kInput ? sizeof(T) : 0));
  for (int64_t g = g0; g < g1; g += block)
    backward_block<S, T, kInput, kDots>(p, grad_output, input, offset, mask, grad_input, grad_offset, grad_mask, zeros,
                                        scratch, n, g, g + block < g1 ? g + block : g1);
}

template <typename S, typename T>
void backward(const Problem& p, const S* grad_output, const S* input, const S* offset, const S* mask, T* grad_input,
              S* grad_offset, S* grad_mask, const S* zeros, void* scratch, int64_t n, int64_t g0, int64_t g1,
              bool want_input, bool want_points) {
  if (want_input && want_points)
    backward_task<S, T, true, true>(p, grad_output, input, offset, mask, grad_input, grad_offset, grad_mask, zeros,
                                    scratch, n, g0, g1);
  else if (want_input)
    backward_task<S, T, true, false>(p, grad_output, input, offset, mask, grad_input, grad_offset, grad_mask, zeros,
                                     scratch, n, g0, g1);
  else
    backward_task<S, T, false, true>(p, grad_output, input, offset, mask, grad_input, grad_offset, grad_mask, zeros,
                                     scratch, n, g0, g1);
}

// ---- what the registration sees

inline void forward_bf16(const Problem& p, const void* input, const void* offset, const void* mask, void* output,
                         const void* zeros, void* scratch, int64_t begin, int64_t end) {
  forward<Bf16, float>(p, (const Bf16*)input, (const Bf16*)offset, (const Bf16*)mask, (Bf16*)output,
                       (const Bf16*)zeros, scratch, begin, end);
}

inline void backward_bf16(const Problem& p, const void* grad_output, const void* input, const void* offset,
                          const void* mask, float* grad_input, void* grad_offset, void* grad_mask, const void* zeros,
                          void* scratch, int64_t n, int64_t g0, int64_t g1, bool want_input, bool want_points) {
  backward<Bf16, float>(p, (const Bf16*)grad_output, (const Bf16*)input, (const Bf16*)offset, (const Bf16*)mask,
                        grad_input, (Bf16*)grad_offset, (Bf16*)grad_mask, (const Bf16*)zeros, scratch, n, g0, g1,
                        want_input, want_points);
}

inline int64_t scratch_bytes(const Problem& p) {
  // a strip has kStripPoints points, or those of one pixel if they are more
  const int64_t pixel = p.groups * p.points;
  const int64_t points = pixel > kStripPoints ? pixel : kStripPoints;
  return strip_bytes<double>(points) + 256;  // and a sink for what falls outside
}

}  // namespace INTERNIMAGE_ISA

extern const CpuBuild INTERNIMAGE_BUILD = {
    INTERNIMAGE_NAME,
    {INTERNIMAGE_ISA::forward<float, float>, INTERNIMAGE_ISA::backward<float, float>},
    {INTERNIMAGE_ISA::forward<double, double>, INTERNIMAGE_ISA::backward<double, double>},
    {INTERNIMAGE_ISA::forward_bf16, INTERNIMAGE_ISA::backward_bf16},
    INTERNIMAGE_ISA::scratch_bytes,
};

}  // namespace internimage
