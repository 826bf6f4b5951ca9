#include "pool.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#if defined(__linux__)
#include <sched.h>
#endif

namespace openelm {
namespace {

constexpr uint32_t kOpen = 1u << 31;
constexpr auto kSpin = std::chrono::microseconds(60);  // to wait for more work before sleeping: as between two layers

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

#if defined(__linux__)
// Cores' worth of time that the control group may use; 0 if there is no limit.
int quota() {
  long long most = 0, period = 0;
  if (FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    if (std::fscanf(file, "%lld %lld", &most, &period) != 2) most = 0;
    std::fclose(file);
  } else if (FILE* old = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r")) {
    if (std::fscanf(old, "%lld", &most) != 1) most = 0;
    std::fclose(old);
    period = 100000;
  }
  return most > 0 && period > 0 ? static_cast<int>(std::max(1LL, (most + period - 1) / period)) : 0;
}
#endif

}  // namespace

int usable_cores() {
  int cores = std::max(1u, std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) cores = std::max(1, CPU_COUNT(&set));
  if (int limit = quota()) cores = std::min(cores, limit);
#endif
  return cores;
}

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(0); });
}

Pool::~Pool() {
  stop_.store(true);
  signal_.fetch_add(1);
  signal_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::take() {
  for (int64_t number; (number = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) call_(context_, number);
}

void Pool::run(int64_t count, Call call, const void* context) {
  std::unique_lock<std::mutex> lock(caller_, std::defer_lock);
  if (workers_.empty() || count < 2 || !lock.try_lock()) {
    for (int64_t number = 0; number < count; ++number) call(context, number);
    return;
  }
  call_ = call;
  context_ = context;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  state_.store(kOpen, std::memory_order_release);
  signal_.fetch_add(1, std::memory_order_release);
  signal_.notify_all();
  take();
  // A worker that was too late to join finds the job closed; those that joined have to finish.
  state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int spins = 0; state_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < 2000) relax();
    else std::this_thread::yield();
  }
}

void Pool::work(uint32_t seen) {
  for (;;) {
    const auto ends = std::chrono::steady_clock::now() + kSpin;
    for (int spins = 0; signal_.load(std::memory_order_acquire) == seen; ++spins) {
      if (spins % 64 != 63) {
        relax();
      } else if (std::chrono::steady_clock::now() > ends) {
        signal_.wait(seen, std::memory_order_acquire);
      } else {
        std::this_thread::yield();
      }
    }
    seen = signal_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    uint32_t state = state_.load(std::memory_order_acquire);
    while (state & kOpen) {
      if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
      take();
      state_.fetch_sub(1, std::memory_order_acq_rel);
      break;
    }
  }
}

}  // namespace openelm
