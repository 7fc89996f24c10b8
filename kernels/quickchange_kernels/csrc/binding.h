// Parts that the operations' bindings share: the instruction set, the threads, the plain versions.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <omp.h>

#include <atomic>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "team.h"

namespace quickchange {
namespace {

using at::Tensor;

// Instruction sets that this machine has, the best first.
std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16_kernels());
  if (vnni) found.push_back(&avx512_vnni_kernels());
  if (avx512) found.push_back(&avx512_kernels());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(&avx2_kernels());
#endif
  found.push_back(&baseline_kernels());
  return found;
}

// The instruction set in use; `use_instruction_set` changes it, for tests.
std::atomic<const Kernels*> chosen{available_kernels().front()};

const Kernels& kernels() { return *chosen.load(std::memory_order_relaxed); }

// Threads for the calling thread's operations, where it isn't PyTorch's number.
thread_local int64_t own_threads = 0;

int64_t num_threads() { return own_threads ? own_threads : at::get_num_threads(); }

// While it lives, PyTorch's own operators run on this thread alone, but those that say `wide`: their
// team, which spins for milliseconds after each of them, would take the cores from ours.
class OneTeam {
 public:
  OneTeam() : before_(own_threads), torch_(at::get_num_threads()) {
    own_threads = num_threads();
    wide(false);
  }
  ~OneTeam() {
    own_threads = before_;
    wide(true);
  }
  void wide(bool all) const { omp_set_num_threads(all ? torch_ : 1); }

 private:
  const int64_t before_;
  const int torch_;
};

// Shares units 0 .. count - 1 over the team, each thread taking the next one that is free.
template <class Unit>
void share(int64_t count, const Unit& unit) {
  Team::own().run(count, num_threads(), unit);
}

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Cuts columns in pieces for several units a thread; pieces are multiples of 16.
int64_t piece(int64_t columns, int64_t per_thread) {
  return rounded_up(std::max<int64_t>(1, columns / (num_threads() * per_thread)), 16);
}

bool is_native(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16; }

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Index tables say where kernels read and write, so every binding checks what it is about to follow,
// always: IndexError with the table's name. Messages are made only where a check fails.
void check_index(const char* table, int64_t place, int64_t value, int64_t size) {
  TORCH_CHECK_INDEX(
      value >= 0 && value < size, table, "[", place, "] is ", value, ", outside 0 to ", size - 1);
}

void check_range(const char* table, int64_t place, int64_t begin, int64_t end, int64_t size) {
  TORCH_CHECK_INDEX(
      begin >= 0 && begin <= end && end <= size, table, "[", place, "] is ", begin, " to ", end,
      ", outside 0 to ", size);
}

// Values [begin, end) of a table; one vectorised pass where all is well.
template <class T>
void check_indices(const char* table, const T* values, int64_t begin, int64_t end, int64_t size) {
  using Unsigned = std::make_unsigned_t<T>;
  Unsigned largest = 0;  // a negative index is a very large one
  for (int64_t i = begin; i < end; i++) largest = std::max(largest, Unsigned(values[i]));
  if (begin >= end || uint64_t(largest) < uint64_t(size)) return;
  for (int64_t i = begin; i < end; i++) check_index(table, i, values[i], size);
}

// `count` blocks of `size` elements from `offset` on lie in an arena of `room` elements.
void check_block(
    const char* table, int64_t place, int64_t offset, int64_t count, int64_t size, int64_t room) {
  TORCH_CHECK_INDEX(
      offset >= 0 && offset <= room && size >= 0 && size <= (room - offset) / count, table, "[",
      place, "]: ", count, " times ", size, " elements from ", offset, " on are outside 0 to ", room);
}

template <class Signature>
auto plain_version(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "plain").typed<Signature>();
}

}  // namespace
}  // namespace quickchange
