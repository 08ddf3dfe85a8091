// What the cases of the kernel driver share: heap blocks of exactly the size a kernel may touch, seeded numbers,
// and the count of checks.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>

namespace check {

// A heap block of exactly n elements, so that AddressSanitizer sees an access one byte past the end.
template <class T> class Block {
 public:
  Block() = default;
  explicit Block(int64_t n) : size_(n), data_(new T[static_cast<size_t>(n)]()) {}
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](int64_t i) { return data_[static_cast<size_t>(i)]; }
  const T& operator[](int64_t i) const { return data_[static_cast<size_t>(i)]; }
  int64_t size() const { return size_; }
  void fill(T value) {
    for (int64_t i = 0; i < size_; ++i) data_[static_cast<size_t>(i)] = value;
  }
  Block copy(int64_t first, int64_t n) const {
    Block other(n);
    for (int64_t i = 0; i < n; ++i) other[i] = (*this)[first + i];
    return other;
  }

 private:
  int64_t size_ = 0;
  std::unique_ptr<T[]> data_;
};

// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  float uniform(float low, float high) {
    return low + (high - low) * (static_cast<float>(bits() >> 40) * 0x1p-24f);
  }

 private:
  uint64_t state_;
};

inline long passed = 0, failed = 0;

// `what` is a function that names the case; it is called only when the check fails.
template <class What> void expect(bool ok, What what) {
  if (ok) {
    ++passed;
    return;
  }
  if (++failed <= 20) std::printf("FAILED %s\n", std::string(what()).c_str());
}

// Bit for bit, except that one NaN is as good as another.
inline bool same(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) || (std::isnan(a) && std::isnan(b));
}
inline bool same(const Block<float>& a, const Block<float>& b) {
  if (a.size() > b.size()) return false;
  for (int64_t i = 0; i < a.size(); ++i)
    if (!same(a[i], b[i])) return false;
  return true;
}

// Runs a call on a fresh thread: the scratch that kernels keep per thread is then allocated for this call alone,
// and a read past what the call needs leaves the block.
template <class Call> void fresh(Call call) { std::thread(call).join(); }

}  // namespace check

// One function a kernel family. `team_only` leaves out what a single thread does: for ThreadSanitizer.
void linear_cases(bool team_only);
void rows_cases(bool team_only);
void attention_cases(bool team_only);
void sample_cases(bool team_only);
void fwht_cases(bool team_only);
void planes_cases(bool team_only);
void program_cases(bool team_only);
