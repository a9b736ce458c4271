// Whether dicts and tensors are what they were: by the objects that the dicts hold, and by where and
// how the tensors lie in memory.
//
// A model of some hundred modules has thousands of such entries. Compared here, between two tokens,
// they cost a tenth of what they cost in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "dlpack.h"

namespace llama_fast {

class Unchanged {
 public:
  // dicts    dicts, and classes for theirs
  // tensors  what of them cannot be read through `api` is not compared
  Unchanged(const pybind11::list& dicts, const pybind11::list& tensors,
            const DLPackExchangeAPI* api)
      : api_(api) {
    for (const pybind11::handle given : dicts) {
      Dict dict{dict_of(given), {}};
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(dict.of.ptr(), &at, &key, &value);) {
        dict.held.push_back(pybind11::reinterpret_borrow<pybind11::object>(key));
        dict.held.push_back(pybind11::reinterpret_borrow<pybind11::object>(value));
      }
      dicts_.push_back(std::move(dict));
    }
    for (const pybind11::handle given : tensors) {
      DLTensor t;
      if (!read(given, t)) continue;
      Place place{pybind11::reinterpret_borrow<pybind11::object>(given), t, {}};
      place.sizes.assign(t.shape, t.shape + t.ndim);
      place.sizes.insert(place.sizes.end(), t.strides, t.strides + t.ndim);
      places_.push_back(std::move(place));
    }
  }

  bool holds() const {
    for (const Dict& dict : dicts_) {
      if (size_t(PyDict_GET_SIZE(dict.of.ptr())) * 2 != dict.held.size()) return false;
      const pybind11::object* seen = dict.held.data();
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(dict.of.ptr(), &at, &key, &value); seen += 2)
        if (key != seen[0].ptr() || value != seen[1].ptr()) return false;
    }
    for (const Place& place : places_) {
      DLTensor t;
      if (!read(place.of, t)) return false;
      const DLTensor& old = place.tensor;
      if (t.data != old.data || t.byte_offset != old.byte_offset || t.ndim != old.ndim ||
          t.dtype.code != old.dtype.code || t.dtype.bits != old.dtype.bits ||
          t.device.device_type != old.device.device_type ||
          t.device.device_id != old.device.device_id)
        return false;
      for (int32_t d = 0; d < t.ndim; ++d)
        if (t.shape[d] != place.sizes[d] || t.strides[d] != place.sizes[t.ndim + d]) return false;
    }
    return true;
  }

 private:
  struct Dict {
    pybind11::object of;
    std::vector<pybind11::object> held;  // key, value, key, value …
  };
  struct Place {
    pybind11::object of;
    DLTensor tensor;  // its pointers to shape and strides are not used
    std::vector<int64_t> sizes;
  };

  static pybind11::object dict_of(pybind11::handle given) {
    if (!PyType_Check(given.ptr())) return pybind11::reinterpret_borrow<pybind11::object>(given);
    auto* type = reinterpret_cast<PyTypeObject*>(given.ptr());
#if PY_VERSION_HEX >= 0x030C0000
    return pybind11::reinterpret_steal<pybind11::object>(PyType_GetDict(type));
#else
    return pybind11::reinterpret_borrow<pybind11::object>(type->tp_dict);
#endif
  }

  bool read(pybind11::handle tensor, DLTensor& t) const {
    if (api_->dltensor_from_py_object(tensor.ptr(), &t) == 0 && (t.strides || !t.ndim)) return true;
    PyErr_Clear();
    return false;
  }

  const DLPackExchangeAPI* api_;
  std::vector<Dict> dicts_;
  std::vector<Place> places_;
};

}  // namespace llama_fast
