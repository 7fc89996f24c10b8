// What this machine can do, as `bench machine` measures it: see roofline/cpu_machine.py.
#pragma once

#include <chrono>

#include "binding.h"
#include "peak_rates.h"

namespace quickchange {
namespace {

template <class Work>
double seconds_of(const Work& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Multiply-adds a second of all threads together on operands of a type; 0 where this instruction set
// has no instruction for it.
double multiply_adds(const std::string& type, int64_t rounds) {
  const PeakLoop loop = peak_loop(type, kernels().name());
  if (!loop) return 0;
  std::atomic<int64_t> done{0};
  const double seconds =
      seconds_of([&] { share(num_threads(), [&](int64_t) { done += loop(rounds); }); });
  return done / seconds;
}

// Bytes a second that all threads together read from `data`, uint8.
double read_memory(const Tensor& data) {
  TORCH_CHECK_VALUE(
      data.scalar_type() == at::kByte && data.is_contiguous(), "read_memory: data must be uint8, in one piece");
  const ReadLoop loop = read_loop(kernels().name());
  const int64_t pieces = num_threads() * 4, bytes = data.numel() / pieces;
  std::atomic<uint64_t> sum{0};
  const double seconds = seconds_of([&] {
    share(pieces, [&](int64_t i) { sum ^= loop(quickchange::data<char>(data) + i * bytes, bytes); });
  });
  return pieces * bytes / seconds;
}

// Seconds of an operation that shares nothing out but a unit a thread: what it costs to begin it on
// all threads and to wait for all, `count` times on end.
double share_cost(int64_t count) {
  std::atomic<int64_t> done{0};
  const double seconds = seconds_of([&] {
    for (int64_t i = 0; i < count; i++) share(num_threads(), [&](int64_t) { done++; });
  });
  return seconds / count;
}

}  // namespace
}  // namespace quickchange
