// Memory that the kernels own.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace vs {

// Zeroed 64-byte aligned array.
template <typename T>
class Array {
 public:
  explicit Array(size_t count = 0) : count_(count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    data_.reset(bytes ? static_cast<T*>(aligned_alloc(64, bytes)) : nullptr);
    if (bytes && !data_) throw std::bad_alloc();
    if (bytes) memset(static_cast<void*>(data_.get()), 0, bytes);
  }
  Array(const T* from, size_t count) : Array(count) { memcpy(data_.get(), from, count * sizeof(T)); }
  T* get() { return data_.get(); }
  const T* get() const { return data_.get(); }
  T& operator[](size_t i) { return data_.get()[i]; }
  const T& operator[](size_t i) const { return data_.get()[i]; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  struct Free {
    void operator()(T* p) const { free(p); }
  };
  size_t count_;
  std::unique_ptr<T, Free> data_;
};

}  // namespace vs
