// Scratch: 64-byte aligned arrays from one block of memory that the caller keeps between calls.
#pragma once
#include <cstddef>
#include <cstdint>

namespace vs {

// Hands out arrays one after the other; from nothing, it counts what they take.
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}
  template <typename T>
  void take(T*& array, size_t count) {
    array = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

}  // namespace vs
