// sample: see sample_contract.py. A row is read in blocks, whose best logits say which blocks a
// filter can leave out. `masses` is bit for bit `sample_plain.masses`. No algorithm or container of
// the standard library here: its code, compiled for one instruction set, would serve all.

enum Filter { TOP_K, TOP_P, MIN_P, TYPICAL_P };  // in the order of sample_contract.py's FILTERS

constexpr int64_t BLOCK = SAMPLE_BLOCK;
constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr int LIMB = MASS_BITS / 2;

// Masses of one block: hi · 2²¹ + lo, in halves so that sums of a block stay within 32 bits.
struct BlockMasses {
  int32_t hi[BLOCK], lo[BLOCK];

  int64_t at(int64_t i) const { return (int64_t(hi[i]) << LIMB) + lo[i]; }

  int64_t sum() const {
    int32_t high = 0, low = 0;
    for (int64_t i = 0; i < BLOCK; i++) high += hi[i], low += lo[i];
    return (int64_t(high) << LIMB) + low;
  }
};

// Tokens that one row keeps.
struct Kept {
  float peak, scale;
  float least_logit = NEVER;
  int64_t least_mass = 1;
  int32_t depth = 0, radius = -1;  // depths within `radius` of `depth`; all where it is negative
};

// log2 of weights beside the best's, at least -64.
inline vec powers(vec logit, const Kept& kept) {
  vec power = rounded(rounded(logit - kept.peak) / kept.scale);
  power = rounded(power * 1.44269504f);
  const bits32 inside =
      reinterpret_cast<bits32>(power > -64.0f) & reinterpret_cast<bits32>(power <= 0.0f);
  return choose(inside, power, splat(-64.0f));
}

// Depths of one block; see sample_contract.py.
inline void depths(const float* logits, const Kept& kept, int32_t* out) {
  for (int64_t i = 0; i < BLOCK; i += W) {
    const ints depth = __builtin_convertvector(powers(load(logits + i), kept) * -65536.0f, ints);
    std::memcpy(out + i, &depth, sizeof depth);
  }
}

inline int32_t distance(int32_t one, int32_t other) { return one < other ? other - one : one - other; }

inline void masses(const float* logits, const Kept& kept, BlockMasses& out) {
  const int32_t least_hi = int32_t(kept.least_mass >> LIMB);
  const int32_t least_lo = int32_t(kept.least_mass & ((int64_t(1) << LIMB) - 1));
  const vec rounder = splat(12582912.0f), one = splat(1.0f);
  for (int64_t i = 0; i < BLOCK; i += W) {
    const vec logit = load(logits + i);
    const vec power = powers(logit, kept);
    const vec whole = rounded(power + rounder) - rounder;
    const vec part = rounded(power - whole);
    vec value = splat(EXP2[5]);
    for (int c = 4; c >= 0; c--) value = rounded(value * part) + EXP2[c];
    value = rounded(value * part) + one;
    const ints exponent = (__builtin_convertvector(whole, ints) + (127 + LIMB)) << 23;
    const vec scaled = rounded(value * reinterpret_cast<vec>(exponent));  // mass / 2²¹, exactly
    ints hi = __builtin_convertvector(scaled, ints);
    ints lo = __builtin_convertvector(
        (scaled - __builtin_convertvector(hi, vec)) * float(1 << LIMB), ints);
    const ints stays = (hi > least_hi | (hi == least_hi & lo >= least_lo)) &
                       reinterpret_cast<ints>(logit >= kept.least_logit);
    hi &= stays;
    lo &= stays;
    std::memcpy(out.hi + i, &hi, sizeof hi);
    std::memcpy(out.lo + i, &lo, sizeof lo);
  }
  if (kept.radius < 0) return;
  int32_t depth[BLOCK];
  depths(logits, kept, depth);
  for (int64_t i = 0; i < BLOCK; i++)
    if (distance(depth[i], kept.depth) > kept.radius) out.hi[i] = out.lo[i] = 0;
}

// A row of logits in whole blocks, the last one filled up with -inf.
class BlockedRow {
 public:
  BlockedRow(const float* logits, int64_t size) : logits_(logits), size_(size) {
    const int64_t whole = size / BLOCK * BLOCK;
    for (int64_t i = 0; i < BLOCK; i++)
      tail_[i] = whole + i < size ? logits[whole + i] : NEVER;
  }

  int64_t size() const { return size_; }
  int64_t blocks() const { return (size_ + BLOCK - 1) / BLOCK; }
  const float* block(int64_t b) const {
    return (b + 1) * BLOCK <= size_ ? logits_ + b * BLOCK : tail_;
  }

 private:
  const float* logits_;
  int64_t size_;
  float tail_[BLOCK];
};

// best[b] = the best logit of block b; false where the row holds NaN or has no finite best.
inline bool block_bests(const BlockedRow& row, float* best, float& peak) {
  bits32 nan{};
  peak = NEVER;
  for (int64_t b = 0; b < row.blocks(); b++) {
    const float* p = row.block(b);
    vec high = load(p);
    nan |= reinterpret_cast<bits32>(high != high);
    for (int64_t i = W; i < BLOCK; i += W) {
      const vec v = load(p + i);
      nan |= reinterpret_cast<bits32>(v != v);
      high = highest_of(v, high);
    }
    best[b] = NEVER;
    for (int i = 0; i < W; i++) best[b] = std::max(best[b], high[i]);
    peak = std::max(peak, best[b]);
  }
  for (int i = 0; i < W; i++)
    if (nan[i]) return false;
  return peak - peak == 0;  // finite
}

inline int64_t first_best(const BlockedRow& row, const float* best, float peak) {
  int64_t b = 0, i = 0;
  while (best[b] != peak) b++;
  const float* p = row.block(b);
  while (p[i] != peak) i++;
  return b * BLOCK + i;
}

struct CountOf {
  int64_t operator()(int64_t) const { return 1; }
};
struct MassOf {
  int64_t operator()(int64_t value) const { return value; }
};

// A v in [low, high) for which the values >= v are the fewest whose weights add up to `wanted`; those
// >= low do. By bisection, a vectorised pass a bit, until the values >= v can't be fewer: each of
// them weighs at least as much as v.
template <class Weight>
inline int64_t edge(
    const int64_t* values, int64_t count, int64_t low, int64_t high, int64_t wanted, Weight weight) {
  int64_t over = std::numeric_limits<int64_t>::max();
  while (high - low > 1 && over >= weight(low)) {
    const int64_t middle = low + (high - low) / 2;
    int64_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += values[i] >= middle ? weight(values[i]) : 0;
    if (sum >= wanted) low = middle, over = sum - wanted;
    else high = middle;
  }
  return low;
}

// An integer that orders as the (finite or infinite) logit does.
inline int64_t key_of(float logit) {
  const float unsigned_zero = logit == 0 ? 0.0f : logit;
  int32_t bits;
  std::memcpy(&bits, &unsigned_zero, sizeof bits);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

inline float logit_of(int64_t key) {
  const int32_t bits = key < 0 ? int32_t(key) ^ 0x7fffffff : int32_t(key);
  float logit;
  std::memcpy(&logit, &bits, sizeof logit);
  return logit;
}

// A logit that the k best reach and no other, k < V. Where there are k blocks, k of them have a
// best of at least the k-th best of the blocks' bests: the k best logits are not below it, and few
// others.
inline float top_k_edge(const BlockedRow& row, const SampleScratch& s, float peak, int64_t k) {
  const int64_t lowest = key_of(NEVER), above = key_of(peak) + 1;
  int64_t bound = lowest;
  if (k <= row.blocks()) {
    for (int64_t b = 0; b < row.blocks(); b++) s.found[b] = key_of(s.best[b]);
    bound = edge(s.found, row.blocks(), lowest, above, k, CountOf());
  }
  const float least = logit_of(bound);
  int64_t count = 0;
  for (int64_t b = 0; b < row.blocks(); b++) {
    if (s.best[b] < least) continue;
    const float* p = row.block(b);
    const int64_t tokens = std::min(BLOCK, row.size() - b * BLOCK);
    for (int64_t i = 0; i < tokens; i++) {
      s.found[count] = key_of(p[i]);
      count += p[i] >= least;
    }
  }
  return logit_of(edge(s.found, count, bound, above, k, CountOf()));
}

// s.sums = the kept masses' sum of every block. Returns the sum of all.
inline int64_t block_sums(const BlockedRow& row, const Kept& kept, const SampleScratch& s) {
  BlockMasses block;
  int64_t total = 0;
  for (int64_t b = 0; b < row.blocks(); b++) {
    s.sums[b] = 0;
    if (s.best[b] < kept.least_logit) continue;
    masses(row.block(b), kept, block);
    s.sums[b] = block.sum();
    total += s.sums[b];
  }
  return total;
}

// The least mass in the nucleus; s.sums as `block_sums` left them.
inline int64_t nucleus_edge(
    const BlockedRow& row, Kept kept, const SampleScratch& s, int64_t total, double top_p) {
  const int64_t wanted = std::max<int64_t>(1, int64_t(double(total) * top_p));
  // All masses below it are less than total - wanted together: the edge is not among them.
  kept.least_mass = std::max<int64_t>(1, (total - wanted) / row.size());
  BlockMasses block;
  int64_t count = 0;
  for (int64_t b = 0; b < row.blocks(); b++) {
    if (s.sums[b] < kept.least_mass) continue;
    masses(row.block(b), kept, block);
    for (int64_t i = 0; i < BLOCK; i++) {
      s.found[count] = block.at(i);
      count += s.found[count] != 0;
    }
  }
  const int64_t above = (int64_t(1) << MASS_BITS) + 1;
  return edge(s.found, count, kept.least_mass, above, wanted, MassOf());
}

// A token's mass, 1 at least, beside a number of 22 bits.
inline int64_t joined(int64_t number, int64_t mass) {
  return int64_t(uint64_t(number) << MASS_BITS | uint64_t(mass - 1));
}
inline int64_t number_of(int64_t value) { return int64_t(uint64_t(value) >> MASS_BITS); }
inline int64_t mass_of(int64_t value) {
  return (value & ((int64_t(1) << MASS_BITS) - 1)) + 1;
}

// Sets the depths that are typical; s.sums as `block_sums` left them.
inline void keep_typical(
    const BlockedRow& row, Kept& kept, const SampleScratch& s, int64_t total, double typical_p) {
  BlockMasses block;
  int32_t depth[BLOCK];
  int64_t high = 0, low = 0, count = 0;
  for (int64_t b = 0; b < row.blocks(); b++) {
    if (!s.sums[b]) continue;
    masses(row.block(b), kept, block);
    depths(row.block(b), kept, depth);
    for (int64_t i = 0; i < BLOCK; i++) {
      if (!block.at(i)) continue;
      high += int64_t(block.hi[i]) * depth[i];
      low += int64_t(block.lo[i]) * depth[i];
      s.found[count++] = joined(depth[i], block.at(i));
    }
  }
  const int32_t mean =
      int32_t((double(high) * double(1 << LIMB) + double(low)) / double(total));
  for (int64_t i = 0; i < count; i++)
    s.found[i] = joined(distance(int32_t(number_of(s.found[i])), mean), mass_of(s.found[i]));
  // By bisection; what lies within `least`, `settled` in all, and beyond `most` is left out.
  const int64_t wanted = std::max<int64_t>(1, int64_t(double(total) * typical_p));
  int64_t least = -1, most = int64_t(1) << 22, settled = 0;
  while (most - least > 1) {
    const int64_t middle = least + (most - least) / 2;
    int64_t sum = 0, left = 0;
    for (int64_t i = 0; i < count; i++)
      sum += number_of(s.found[i]) <= middle ? mass_of(s.found[i]) : 0;
    const bool reached = settled + sum >= wanted;
    for (int64_t i = 0; i < count; i++) {
      s.found[left] = s.found[i];
      left += (number_of(s.found[i]) <= middle) == reached;
    }
    count = left;
    if (reached) most = middle;
    else least = middle, settled += sum;
  }
  kept.depth = mean;
  kept.radius = int32_t(most);
}

inline int64_t inverse_cdf(
    const BlockedRow& row, const Kept& kept, const SampleScratch& s, int64_t total,
    double uniform) {
  // A uniform of 1, which the contract does not have, stays in the row.
  int64_t left = std::min(int64_t(double(total) * uniform), total - 1);
  int64_t b = 0, i = 0;
  while (s.sums[b] <= left) left -= s.sums[b++];
  BlockMasses block;
  masses(row.block(b), kept, block);
  while (block.at(i) <= left) left -= block.at(i++);
  return b * BLOCK + i;
}

inline int64_t draw(
    const SampleArgs& a, int64_t r, const BlockedRow& row, float peak, const SampleScratch& s) {
  Kept kept{peak, std::max(float(a.temperature[r]), SMALLEST_TEMPERATURE)};
  const auto value = [&](Filter filter, double off) {
    return a.filters[filter] ? a.filters[filter][r] : off;
  };
  const double top_k = value(TOP_K, 0), top_p = value(TOP_P, 1);
  const double min_p = value(MIN_P, 0), typical_p = value(TYPICAL_P, 1);
  if (top_k > 0 && top_k < double(row.size()))
    kept.least_logit = top_k_edge(row, s, peak, int64_t(top_k));
  int64_t least = 1;
  if (top_p < 1) least = nucleus_edge(row, kept, s, block_sums(row, kept, s), top_p);
  const double whole = double(int64_t(1) << MASS_BITS);
  least = std::max(least, int64_t(std::min(whole, min_p * whole)));
  kept.least_mass = least;
  if (typical_p < 1) keep_typical(row, kept, s, block_sums(row, kept, s), typical_p);
  return inverse_cdf(row, kept, s, block_sums(row, kept, s), a.uniform[r]);
}

inline void sample(const SampleArgs& a, const SampleScratch& s, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const BlockedRow row(a.logits + r * a.ld, a.V);
    float peak;
    a.sound[r] = block_bests(row, s.best, peak);
    a.tokens[r] = 0;
    if (!a.sound[r]) continue;
    const bool drawn = a.temperature && a.temperature[r] > 0;
    a.tokens[r] = drawn ? draw(a, r, row, peak, s) : first_best(row, s.best, peak);
  }
}
