// The signature of a call of an op: everything that its launcher depends on, as the bytes of a key.
//
// Reading shape, strides, dtype and device of a tensor from Python takes 0.4 µs, as much as a
// short kernel; through DLPack's C interface it takes a tenth of that.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <fstream>

#include "dlpack.h"

namespace llama_fast {

// Where the memory of this process begins. A tensor whose storage was freed begins at its offset into
// nothing, which is below.
inline uintptr_t lowest_address() {
  uintptr_t lowest = 0;
  std::ifstream("/proc/self/maps") >> std::hex >> lowest;
  return lowest ? lowest : 1;
}

class CallSignature {
 public:
  // tensor, parameter  the types that are no subclass with ways of its own
  // fallback           (args, grad) → the key, for arguments that are not read here
  CallSignature(pybind11::type tensor, pybind11::type parameter,
             const DLPackExchangeAPI* api, pybind11::function fallback)
      : tensor_(std::move(tensor)), parameter_(std::move(parameter)), api_(api),
        fallback_(std::move(fallback)), requires_grad_("requires_grad"),
        is_neg_(tensor_.attr("is_neg")) {}

  // A key, or None where `grad` and a tensor requires a gradient, or where one is not what its memory
  // holds.
  pybind11::object operator()(const pybind11::tuple& args, bool grad) const {
    Key key;
    for (const pybind11::handle arg : args) {
      if (arg.is_none()) {
        key.add(NONE);
      } else if (is_tensor(arg)) {
        if ((grad && arg.attr(requires_grad_).ptr() == Py_True) || is_negated(arg))
          return pybind11::none();
        DLTensor t;
        if (api_->dltensor_from_py_object(arg.ptr(), &t) != 0) {
          PyErr_Clear();
          return fallback_(args, grad);
        }
        if (reinterpret_cast<uintptr_t>(t.data) < lowest_ && has_elements(t))
          return pybind11::none();
        key.add(TENSOR | int64_t(t.ndim) << 8 | int64_t(t.dtype.code) << 16 |
                int64_t(t.dtype.bits) << 24 | int64_t(t.device.device_type) << 32 |
                int64_t(t.device.device_id) << 48);
        for (int32_t d = 0; d < t.ndim; ++d) {
          key.add(t.shape[d]);
          key.add(t.strides[d]);
        }
      } else if (PyBool_Check(arg.ptr())) {
        key.add(arg.ptr() == Py_True ? TRUE : FALSE);
      } else if (PyLong_CheckExact(arg.ptr())) {
        int overflow = 0;
        const int64_t value = PyLong_AsLongLongAndOverflow(arg.ptr(), &overflow);
        if (overflow) return fallback_(args, grad);
        key.add(INT);
        key.add(value);
      } else if (PyFloat_CheckExact(arg.ptr())) {
        const double value = PyFloat_AS_DOUBLE(arg.ptr());
        int64_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        key.add(FLOAT);
        key.add(bits);
      } else if (PyUnicode_CheckExact(arg.ptr())) {
        Py_ssize_t size = 0;
        const char* text = PyUnicode_AsUTF8AndSize(arg.ptr(), &size);
        if (text == nullptr) throw pybind11::error_already_set();
        key.add(TEXT | int64_t(size) << 8);
        for (Py_ssize_t i = 0; i < size; i += 8) {
          int64_t word = 0;
          std::memcpy(&word, text + i, std::min<Py_ssize_t>(8, size - i));
          key.add(word);
        }
      } else {
        return fallback_(args, grad);
      }
    }
    if (key.full()) return fallback_(args, grad);
    return key.bytes();
  }

 private:
  enum Tag : int64_t { NONE, TENSOR, TRUE, FALSE, INT, FLOAT, TEXT };

  class Key {
   public:
    void add(int64_t word) {
      if (count_ < words_.size()) words_[count_] = word;
      ++count_;
    }
    bool full() const { return count_ > words_.size(); }
    pybind11::bytes bytes() const {
      return {reinterpret_cast<const char*>(words_.data()), count_ * sizeof(int64_t)};
    }

   private:
    std::array<int64_t, 160> words_;
    size_t count_ = 0;
  };

  bool is_tensor(pybind11::handle arg) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(arg.ptr()));
    return type == tensor_.ptr() || type == parameter_.ptr();
  }

  // Whether the numbers are those in memory with the other sign, as those of x.conj().imag.
  bool is_negated(pybind11::handle arg) const {
    PyObject* const args[] = {arg.ptr()};
    const auto result = pybind11::reinterpret_steal<pybind11::object>(
        PyObject_Vectorcall(is_neg_.ptr(), args, 1, nullptr));
    if (!result) throw pybind11::error_already_set();
    return result.ptr() == Py_True;
  }

  static bool has_elements(const DLTensor& t) {
    for (int32_t d = 0; d < t.ndim; ++d)
      if (t.shape[d] == 0) return false;
    return true;
  }

  pybind11::type tensor_, parameter_;
  const DLPackExchangeAPI* api_;
  pybind11::function fallback_;
  pybind11::str requires_grad_;
  pybind11::object is_neg_;
  const uintptr_t lowest_ = lowest_address();
};

}  // namespace llama_fast
