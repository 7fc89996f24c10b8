// The threads that share an operation's units. They are this library's own: a unit is whoever's takes
// it next, and an operation is over once all units are done, not once all threads have come by, so
// that a thread which the system holds up between two units delays nobody. No torch here.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <fstream>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

namespace quickchange {

inline void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Cores' worth of time that the control group may take, rounded up; 0: as much as there is.
inline int64_t cores_of_quota() {
  std::ifstream joint("/sys/fs/cgroup/cpu.max");  // cgroup 2: "max 100000" or "150000 100000"
  std::string quota;
  double period = 0;
  if (!(joint >> quota >> period)) {
    std::ifstream own("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), length("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    if (!(own >> quota) || !(length >> period)) return 0;
  }
  const double given = quota == "max" ? 0 : std::atof(quota.c_str());
  return given > 0 && period > 0 ? std::max<int64_t>(1, int64_t(given / period + 0.999)) : 0;
}

// Cores that this process may use now: its affinity, its control group's quota.
inline int64_t usable_cores() {
  int64_t allowed = std::thread::hardware_concurrency();
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) allowed = CPU_COUNT(&set);
#endif
  const int64_t quota = cores_of_quota();
  return std::max<int64_t>(1, quota ? std::min(allowed, quota) : allowed);
}

// A leader and its helpers. One operation at a time: whoever comes while another leads does its units
// alone.
class Team {
 public:
  // The process's team. A forked child has none of its parent's threads, so it gets a team of its own.
  static Team& own() {
    static std::atomic<Team*> team{nullptr};
    static const int registered = pthread_atfork(nullptr, nullptr, [] { team = nullptr; });
    (void)registered;
    Team* found = team.load(std::memory_order_acquire);
    if (found) return *found;
    Team* made = new Team;  // never deleted: its threads run until the process ends
    if (team.compare_exchange_strong(found, made)) return *made;
    return *found;
  }

  // unit(0) .. unit(count - 1), on up to `threads` threads. Throws what a unit throws first.
  template <class Unit>
  void run(int64_t count, int64_t threads, const Unit& unit) {
    std::unique_lock<std::mutex> lead(leading_, std::try_to_lock);
    if (lead.owns_lock()) threads = std::min(threads, cores());
    if (!lead.owns_lock() || threads < 2 || count < 2 || count > MOST_UNITS) {
      for (int64_t i = 0; i < count; i++) unit(i);
      return;
    }
    call_ = [](const void* context, int64_t i) { (*static_cast<const Unit*>(context))(i); };
    context_ = &unit;
    done_.store(0, std::memory_order_relaxed);
    gather(threads - 1);
    ticket_.store(uint64_t(count) << COUNT_SHIFT);  // from here on helpers take units
    if (sleeping_.load()) {
      { std::lock_guard<std::mutex> held(rest_); }
      rested_.notify_all();
    }
    while (take()) {
    }
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < count; spins++)
      spins < SPINS_BEFORE_YIELD ? pause_thread() : void(sched_yield());
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  static constexpr int COUNT_SHIFT = 32;
  static constexpr int64_t MOST_UNITS = int64_t(1) << 30;
  static constexpr int SPINS_BEFORE_YIELD = 1000;
  // A helper is awake from one operation of a step to the next, and sleeps where nothing comes.
  static constexpr auto AWAKE = std::chrono::microseconds(60);

  static int64_t next_of(uint64_t ticket) { return ticket & 0xffffffff; }
  static int64_t count_of(uint64_t ticket) { return ticket >> COUNT_SHIFT; }

  // Cores that may be used, read anew each second.
  int64_t cores() {
    const auto now = std::chrono::steady_clock::now();
    if (cores_ == 0 || now - read_ > std::chrono::seconds(1)) {
      cores_ = usable_cores();
      read_ = now;
    }
    return cores_;
  }

  void gather(int64_t helpers) {
    try {
      for (; threads_ < helpers; threads_++) std::thread([this, i = threads_] { help(i); }).detach();
    } catch (const std::system_error&) {
      // The system gives no more threads: those that are there do the work.
    }
    helpers_.store(helpers, std::memory_order_relaxed);
  }

  // Does the next unit, if there is one. A ticket holds count and next unit in one word, so that what
  // is taken is always a unit of the operation that runs now, however late a thread comes.
  bool take() {
    const uint64_t seen = ticket_.load(std::memory_order_acquire);
    if (next_of(seen) >= count_of(seen)) return false;
    const uint64_t got = ticket_.fetch_add(1, std::memory_order_acq_rel);
    if (next_of(got) >= count_of(got)) return false;
    try {
      call_(context_, next_of(got));
    } catch (...) {
      std::lock_guard<std::mutex> held(rest_);
      if (!failure_) failure_ = std::current_exception();
    }
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  bool wanted(int64_t helper) const {
    const uint64_t seen = ticket_.load();
    return helper < helpers_.load(std::memory_order_relaxed) && next_of(seen) < count_of(seen);
  }

  void help(int64_t helper) {
    auto idle_since = std::chrono::steady_clock::now();
    for (int64_t spins = 0;; spins++) {
      if (wanted(helper)) {
        while (take()) {
        }
        idle_since = std::chrono::steady_clock::now();
        continue;
      }
      pause_thread();
      if (spins % 64 || std::chrono::steady_clock::now() - idle_since < AWAKE) continue;
      std::unique_lock<std::mutex> held(rest_);
      sleeping_.fetch_add(1);
      rested_.wait(held, [&] { return wanted(helper); });
      sleeping_.fetch_sub(1);
      idle_since = std::chrono::steady_clock::now();
    }
  }

  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int64_t> sleeping_{0};
  std::atomic<int64_t> helpers_{0};
  void (*call_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  std::exception_ptr failure_;
  std::mutex leading_, rest_;
  std::condition_variable rested_;
  int64_t threads_ = 0;
  int64_t cores_ = 0;
  std::chrono::steady_clock::time_point read_;
};

}  // namespace quickchange
