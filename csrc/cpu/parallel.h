// Dynamic work sharing on libtorch's thread pool, and per-thread scratch memory.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <memory>
#include <new>

namespace moba::cpu {

// Runs body(i) once for each i in [0, count). Tasks cost different amounts (a causal triangle), so threads take the
// next one as they become free. `make_scratch()` is called once per thread and handed to each of its tasks.
template <typename MakeScratch, typename Body>
void for_each_task(int64_t count, const MakeScratch& make_scratch, const Body& body) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    auto scratch = make_scratch();
    for (int64_t i = next++; i < count; i = next++) body(i, scratch);
  };
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, work);
}

// Uninitialised array on a cache-line boundary: vector loads never straddle lines, and products see the same alignment
// on every run.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), kAlignment))) {}
  operator T*() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* pointer) const { ::operator delete(pointer, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace moba::cpu
