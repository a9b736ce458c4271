// A tensor as it crosses from Python: where it lies and how.
//
// It is read through DLPack's C functions, which torch has from 2.10 on: that takes a tenth of the time
// that its attributes take. Of an older torch's tensor, Python makes a tuple.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "../args.h"
#include "dlpack.h"

namespace llama_fast {

// The C functions of a type of tensors, or null.
inline const DLPackExchangeAPI* exchange_api(pybind11::handle type) {
  constexpr const char* NAME = "dlpack_exchange_api";
  const auto capsule = pybind11::getattr(type, "__dlpack_c_exchange_api__", pybind11::none());
  if (!PyCapsule_IsValid(capsule.ptr(), NAME)) return nullptr;
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), NAME));
  return api->major == 1 && api->dltensor_from_py_object ? api : nullptr;
}

struct Tensor {
  pybind11::handle object;  // the Python tensor
  void* data = nullptr;
  DLDataType type = {};
  int32_t ndim = 0;
  const int64_t *shape = nullptr, *strides = nullptr;

  // Of a dim, the last one being -1.
  int64_t size(int d) const { return shape[d < 0 ? d + ndim : d]; }
  int64_t stride(int d) const { return strides[d < 0 ? d + ndim : d]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int32_t d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  // Of all dims but the last one.
  int64_t outer() const {
    int64_t n = 1;
    for (int32_t d = 0; d + 1 < ndim; ++d) n *= shape[d];
    return n;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int32_t d = ndim - 1; d >= 0; expected *= shape[d--])
      if (shape[d] != 1 && strides[d] != expected) return numel() == 0;
    return true;
  }
  DType dtype() const {
    return type.code == kDLBfloat ? DType::bf16 : type.bits == 16 ? DType::f16 : DType::f32;
  }
  template <class T> T* as() const { return static_cast<T*>(data); }
};
using OptionalTensor = std::optional<Tensor>;

inline void* data_of(const OptionalTensor& x) { return x ? x->data : nullptr; }

// All dims but the last one, of at most three dims where the tensor is not contiguous.
inline Rows rows(const Tensor& x) {
  const int64_t C = x.size(-1);
  if (x.contiguous()) return {1, 1, x.outer(), 0, 0, C};
  const auto size = [&](int i) { return x.ndim >= 4 - i ? x.size(i - 4) : 1; };
  const auto stride = [&](int i) { return x.ndim >= 4 - i ? x.stride(i - 4) : 1; };
  return {size(0), size(1), size(2), stride(0), stride(1), stride(2)};
}

// x (B, T, heads, D) or (B, T, heads).
inline HeadStrides head_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }
inline Heads heads(const Tensor& x) { return {x.data, head_strides(x)}; }
inline HeadScales head_scales(const OptionalTensor& x) {
  if (!x) return {};
  return {x->as<float>(), head_strides(*x)};
}

// Reads a Python tensor, and holds what its Tensor points to.
struct TensorReader {
  Tensor tensor;

  TensorReader() = default;
  explicit TensorReader(PyObject* x) { read(x); }
  TensorReader(const TensorReader&) = delete;
  TensorReader& operator=(const TensorReader&) = delete;

  void read(PyObject* x) {
    // The most general type seen that has the functions, which all that derive from it have.
    static PyTypeObject* known = nullptr;
    static const DLPackExchangeAPI* known_api = nullptr;
    tensor.object = x;
    PyTypeObject* type = Py_TYPE(x);
    if (known && PyType_IsSubtype(type, known)) return borrow(*known_api);
    const auto* api = exchange_api(reinterpret_cast<PyObject*>(type));
    if (!api) return take();
    if (!known || PyType_IsSubtype(known, type)) {
      Py_INCREF(type);
      known = type;
      known_api = api;
    }
    borrow(*api);
  }

 private:
  void borrow(const DLPackExchangeAPI& api) {
    DLTensor t;
    if (api.dltensor_from_py_object(tensor.object.ptr(), &t) != 0)
      throw pybind11::error_already_set();
    tensor.data = static_cast<char*>(t.data) + t.byte_offset;
    tensor.type = t.dtype;
    tensor.ndim = t.ndim;
    tensor.shape = t.shape;
    tensor.strides = t.strides;
  }

  // Of (address, code, bits, shape, strides).
  void take() {
    static const auto as_tuple = pybind11::module_::import("llama_fast.backends.layout")
                                     .attr("as_tuple").cast<pybind11::object>().release();
    const auto described = as_tuple(tensor.object).cast<pybind11::tuple>();
    tensor.data = reinterpret_cast<void*>(described[0].cast<uintptr_t>());
    tensor.type = {described[1].cast<uint8_t>(), described[2].cast<uint8_t>(), 1};
    own_ = described[3].cast<std::vector<int64_t>>();
    tensor.ndim = int32_t(own_.size());
    const auto strides = described[4].cast<std::vector<int64_t>>();
    own_.insert(own_.end(), strides.begin(), strides.end());
    tensor.shape = own_.data();
    tensor.strides = own_.data() + tensor.ndim;
  }

  std::vector<int64_t> own_;
};

}  // namespace llama_fast
