#include "hadamard_matrix.h"

#include <cmath>
#include <map>
#include <memory>
#include <mutex>

namespace gsm {
namespace {

bool is_prime(int n) {
  if (n < 2) return false;
  for (int d = 2; d * d <= n; ++d)
    if (n % d == 0) return false;
  return true;
}

bool is_power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

// The Legendre symbol of every residue mod q: 0 for 0, 1 for a square, -1 for the rest.
std::vector<int> legendre(int q) {
  std::vector<int> chi(static_cast<size_t>(q), -1);
  for (int i = 1; i < q; ++i) chi[static_cast<size_t>(i * i % q)] = 1;
  chi[0] = 0;
  return chi;
}

// [[0, 1], [border, Q]] with Q[i][j] = chi(i - j): the core of both constructions, [q + 1][q + 1].
std::vector<int> bordered(int q, int border) {
  const std::vector<int> chi = legendre(q);
  const int n = q + 1;
  std::vector<int> s(static_cast<size_t>(n) * static_cast<size_t>(n), 0);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      int& entry = s[static_cast<size_t>(i * n + j)];
      if (i == 0) entry = j > 0;
      else entry = j == 0 ? border : chi[static_cast<size_t>((i - j + q) % q)];
    }
  return s;
}

// H = S + I, of order q + 1 for a prime q = 3 mod 4.
std::vector<int> paley_one(int q) {
  std::vector<int> h = bordered(q, -1);
  for (int i = 0; i <= q; ++i) h[static_cast<size_t>(i * (q + 1) + i)] += 1;
  return h;
}

// H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]], of order 2(q + 1) for a prime q = 1 mod 4.
std::vector<int> paley_two(int q) {
  const std::vector<int> c = bordered(q, 1);
  const int n = q + 1, k = 2 * n;
  const int full[2][2] = {{1, 1}, {1, -1}}, diagonal[2][2] = {{1, -1}, {-1, -1}};
  std::vector<int> h(static_cast<size_t>(k) * static_cast<size_t>(k));
  for (int i = 0; i < k; ++i)
    for (int j = 0; j < k; ++j)
      h[static_cast<size_t>(i * k + j)] =
          i / 2 == j / 2 ? diagonal[i % 2][j % 2] : c[static_cast<size_t>(i / 2 * n + j / 2)] * full[i % 2][j % 2];
  return h;
}

bool has_paley_one(int k) { return is_prime(k - 1) && (k - 1) % 4 == 3; }
bool has_paley_two(int k) { return k % 2 == 0 && is_prime(k / 2 - 1) && (k / 2 - 1) % 4 == 1; }

// The K of an order that is no power of two; 0 where there is none.
int smallest_k(int64_t order) {
  for (int k = 12; k <= kMaxPaley && k <= order; k += 4)
    if (order % k == 0 && is_power_of_two(order / k) && !is_power_of_two(k) && (has_paley_one(k) || has_paley_two(k)))
      return k;
  return 0;
}

std::unique_ptr<Hadamard> make(int64_t order) {
  if (order < 2 || order > kMaxHadamard) return nullptr;
  const int k = is_power_of_two(order) ? 1 : smallest_k(order);
  if (k == 0) return nullptr;
  auto plan = std::make_unique<Hadamard>();
  plan->order = order;
  plan->k = k;
  plan->power = order / k;
  plan->scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(order)));
  if (k == 1) return plan;
  const std::vector<int> h = has_paley_one(k) ? paley_one(k - 1) : paley_two(k / 2 - 1);
  const int groups = k / 4;
  plan->rows.assign(static_cast<size_t>(k * groups), 0);
  plan->columns = plan->rows;
  for (int i = 0; i < k; ++i)
    for (int j = 0; j < k; ++j) {
      const auto at = static_cast<size_t>(i * groups + j / 4);
      const auto bit = static_cast<uint8_t>(1 << j % 4);
      if (h[static_cast<size_t>(i * k + j)] < 0) plan->rows[at] |= bit;
      if (h[static_cast<size_t>(j * k + i)] < 0) plan->columns[at] |= bit;
    }
  return plan;
}

}  // namespace

const Hadamard* hadamard(int64_t order) {
  static std::mutex mutex;
  static std::map<int64_t, std::unique_ptr<Hadamard>> made;  // only orders that exist, so it stays small
  std::lock_guard lock(mutex);
  const auto found = made.find(order);
  if (found != made.end()) return found->second.get();
  std::unique_ptr<Hadamard> plan = make(order);
  if (!plan) return nullptr;
  return (made[order] = std::move(plan)).get();
}

}  // namespace gsm
