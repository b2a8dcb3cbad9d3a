// Late interaction over a tile of similarities that a BLAS has filled: rows are the regions of some images, columns the
// words of some captions, and every pair of them lies in one tile. The maxima of both directions come from one visit.
//
// Threads own pairs in the forward; in the backward they own the items of one side and the groups of the other, so that
// every gradient is summed by one thread in a fixed order: the same bits every run.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "jrl/cpu_math.h"
#include "jrl/registry.h"
#include "jrl/threads.h"

namespace {

using jrl::infinity;

constexpr int64_t kItems = 32;  // whose gradients stay in a cache while every group of the other side visits them

// A choice of 2 or 4 bytes.
struct Choices {
  void* data;
  bool wide;
  int32_t get(int64_t at) const {
    return wide ? static_cast<const int32_t*>(data)[at] : static_cast<const int16_t*>(data)[at];
  }
  void set(int64_t at, int32_t value) const {
    if (wide) {
      static_cast<int32_t*>(data)[at] = value;
    } else {
      static_cast<int16_t*>(data)[at] = static_cast<int16_t>(value);
    }
  }
};

// The maximum of every column and the first row that has it; a NaN is the maximum, and rows that are not live are left
// out, or 0 where `zero`. place stays -1 where no row is a candidate.
template <typename T>
JRL_INLINE void column_maxima(const T* s, int64_t stride, int64_t rows, int64_t columns, const bool* live, bool zero,
                              T* best, int32_t* place) {
  std::fill(best, best + columns, T(0));
  std::fill(place, place + columns, -1);
  for (int64_t i = 0; i < rows; ++i) {
    const bool counts = !live || live[i];
    if (!counts && !zero) continue;
    const T* line = s + i * stride;
    const int32_t row = static_cast<int32_t>(i);
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      const T value = counts ? line[j] : T(0), old = best[j];
      const bool better = (place[j] < 0) | (value > old) | ((value != value) & (old == old));
      best[j] = better ? value : old;
      place[j] = better ? row : place[j];
    }
  }
}

JRL_CLONES void maxima_of(const float* s, int64_t n, int64_t r, int64_t c, const bool* l, bool z, float* b,
                          int32_t* p) {
  column_maxima(s, n, r, c, l, z, b, p);
}
JRL_CLONES void maxima_of(const double* s, int64_t n, int64_t r, int64_t c, const bool* l, bool z, double* b,
                          int32_t* p) {
  column_maxima(s, n, r, c, l, z, b, p);
}

// The same of one row; `scratch` holds its candidates.
template <typename T>
JRL_INLINE T row_maximum(const T* s, int64_t columns, const bool* live, bool zero, T* scratch, int32_t* place) {
  const int32_t none = std::numeric_limits<int32_t>::max();
  T top = -infinity<T>;
  int32_t strange = 0, first = none;
  if (live) {
    const T rest = zero ? T(0) : -infinity<T>;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) scratch[j] = live[j] ? s[j] : rest;
    s = scratch;
  }
#pragma omp simd reduction(max : top) reduction(| : strange)
  for (int64_t j = 0; j < columns; ++j) {
    top = s[j] > top ? s[j] : top;
    strange |= s[j] != s[j];
  }
  if (strange || top == -infinity<T>) {
    for (int64_t j = columns - 1; j >= 0; --j) {
      const bool candidate = !live || zero || live[j];
      if (candidate && (strange ? s[j] != s[j] : true)) first = static_cast<int32_t>(j);
    }
  } else {
#pragma omp simd reduction(min : first)
    for (int64_t j = 0; j < columns; ++j) {
      const int32_t here = s[j] == top ? static_cast<int32_t>(j) : none;
      first = here < first ? here : first;
    }
  }
  *place = first == none ? -1 : first;
  return first == none ? T(0) : s[first];
}

JRL_CLONES float maximum_of(const float* s, int64_t n, const bool* l, bool z, float* w, int32_t* p) {
  return row_maximum(s, n, l, z, w, p);
}
JRL_CLONES double maximum_of(const double* s, int64_t n, const bool* l, bool z, double* w, int32_t* p) {
  return row_maximum(s, n, l, z, w, p);
}

// What takes the gradient: nothing where a masked item has won with its similarity of 0.
inline int32_t chosen(int32_t place, const bool* live) { return place >= 0 && live && !live[place] ? -1 : place; }

// `region_offsets` and `word_offsets` begin at the first image and caption of the tile; the outputs are whole, and
// those of a direction that is not wanted are null.
template <typename T>
int forward(const T* s, int64_t first_image, int64_t images, int64_t first_caption, int64_t captions,
            int64_t all_images, int64_t all_captions, const int64_t* region_offsets, const int64_t* word_offsets,
            const bool* region_mask, const bool* word_mask, int64_t all_regions, int64_t all_words, bool zero,
            T* word_sums, void* region_choice, bool wide_regions, T* region_sums, void* word_choice, bool wide_words) {
  const int64_t stride = word_offsets[captions] - word_offsets[0];
  const Choices of_words{region_choice, wide_regions}, of_regions{word_choice, wide_words};
#pragma omp parallel
  {
    std::vector<T> best(stride);
    std::vector<int32_t> place(stride);
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < images * captions; ++pair) {
      const int64_t b = pair / captions, c = pair % captions;
      const int64_t region = region_offsets[b], regions = region_offsets[b + 1] - region;
      const int64_t word = word_offsets[c], words = word_offsets[c + 1] - word;
      const T* tile = s + (region - region_offsets[0]) * stride + (word - word_offsets[0]);
      const bool* live_regions = region_mask ? region_mask + region : nullptr;
      const bool* live_words = word_mask ? word_mask + word : nullptr;
      const int64_t image = first_image + b, caption = first_caption + c;
      if (word_sums) {
        maxima_of(tile, stride, regions, words, live_regions, zero, best.data(), place.data());
        T sum = 0;
        for (int64_t t = 0; t < words; ++t) {
          const bool counts = !live_words || live_words[t];
          if (counts && place[t] >= 0) sum += best[t];
          of_words.set(image * all_words + word + t, counts ? chosen(place[t], live_regions) : -1);
        }
        word_sums[image * all_captions + caption] = sum;
      }
      if (region_sums) {
        T sum = 0;
        for (int64_t r = 0; r < regions; ++r) {
          const bool counts = !live_regions || live_regions[r];
          int32_t at = -1;
          if (counts) sum += maximum_of(tile + r * stride, words, live_words, zero, best.data(), &at);
          of_regions.set(caption * all_regions + region + r, chosen(at, live_words));
        }
        region_sums[caption * all_images + image] = sum;
      }
    }
  }
  return 0;
}

// target += factor * source, rows of `width`.
template <typename T>
JRL_INLINE void add_row(T* target, T factor, const T* source, int64_t width) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) target[d] += factor * source[d];
}

// Items [begin, end) of x, whose groups are `owner`, and the rows of y that they chose in group h; one of dx and dy.
template <typename T>
JRL_INLINE void add_choices(const T* x, const T* y, T* dx, T* dy, int64_t begin, int64_t end, int64_t width,
                            const int64_t* owner, const T* grad, Choices choice, int64_t at, int64_t start) {
  for (int64_t n = begin; n < end; ++n) {
    const int32_t place = choice.get(at + n);
    if (place < 0) continue;
    const int64_t row = (start + place) * width;
    if (dx) {
      add_row(dx + n * width, grad[owner[n]], y + row, width);
    } else {
      add_row(dy + row, grad[owner[n]], x + n * width, width);
    }
  }
}

JRL_CLONES void choices_of(const float* x, const float* y, float* dx, float* dy, int64_t b, int64_t e, int64_t w,
                           const int64_t* o, const float* g, Choices c, int64_t a, int64_t s) {
  add_choices(x, y, dx, dy, b, e, w, o, g, c, a, s);
}
JRL_CLONES void choices_of(const double* x, const double* y, double* dx, double* dy, int64_t b, int64_t e, int64_t w,
                           const int64_t* o, const double* g, Choices c, int64_t a, int64_t s) {
  add_choices(x, y, dx, dy, b, e, w, o, g, c, a, s);
}

// Items x [items, width] of `groups` groups chose in each of `searched` groups of y, by y_offsets; grad [searched,
// groups], choice [searched, items]. dx and dy begin as zeros; either may be null.
template <typename T>
int backward(const T* x, const T* y, int64_t items, int64_t width, const int64_t* owner, int64_t groups,
             const int64_t* y_offsets, int64_t searched, const T* grad, void* choice, bool wide, T* dx, T* dy) {
  const Choices choices{choice, wide};
  if (dx) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < items; n += kItems)
      for (int64_t h = 0; h < searched; ++h)
        choices_of(x, y, dx, nullptr, n, std::min(items, n + kItems), width, owner, grad + h * groups, choices,
                   h * items, y_offsets[h]);
  }
  if (dy) {
#pragma omp parallel for schedule(static)
    for (int64_t h = 0; h < searched; ++h)
      choices_of(x, y, nullptr, dy, 0, items, width, owner, grad + h * groups, choices, h * items, y_offsets[h]);
  }
  return 0;
}

}  // namespace

JRL_CPU_LAUNCHERS(max_sim_forward, forward);
JRL_CPU_LAUNCHERS(max_sim_backward, backward);
