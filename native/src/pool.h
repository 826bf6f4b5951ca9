// Threads that wait for work, for all cores that this process may use.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace openelm {

int usable_cores();  // by affinity and, in a container, by its share of processor time

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(0) to task(count - 1), on all threads and the caller's, and returns when all have returned. If another
  // caller has the threads, the caller does everything itself.
  template <class Task>
  void run(int64_t count, const Task& task) {
    run(count, [](const void* context, int64_t number) { (*static_cast<const Task*>(context))(number); }, &task);
  }

 private:
  using Call = void (*)(const void*, int64_t);
  void run(int64_t count, Call call, const void* context);
  void work(uint32_t seen);
  void take();

  std::vector<std::thread> workers_;
  std::mutex caller_;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  int64_t count_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> state_{0};  // open or not, and how many workers are at work
  alignas(64) std::atomic<uint32_t> signal_{0};  // changes with every call
  std::atomic<bool> stop_{false};
};

}  // namespace openelm
