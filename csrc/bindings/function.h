// Functions of a module that take tensors and plain numbers by position, and nothing else.
//
// A step of decoding makes hundreds of calls whose kernels take less than a microsecond. rms_norm with
// its tensors takes 280 ns here, and 384 as a function of pybind11's own.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "tensor.h"

namespace llama_fast {

// The Python type that a C++ exception of a kernel becomes.
inline PyObject*& kernel_error() {
  static PyObject* type = PyExc_RuntimeError;
  return type;
}

template <class T> struct Argument;
template <> struct Argument<Tensor> {
  TensorReader reader;
  explicit Argument(PyObject* x) : reader(x) {}
  const Tensor& get() const { return reader.tensor; }
};
template <> struct Argument<OptionalTensor> {
  TensorReader reader;
  OptionalTensor tensor;
  explicit Argument(PyObject* x) {
    if (x == Py_None) return;
    reader.read(x);
    tensor = reader.tensor;
  }
  const OptionalTensor& get() const { return tensor; }
};
template <class T> struct Number {
  T value;
  T get() const { return value; }
};
template <> struct Argument<bool> : Number<bool> {
  explicit Argument(PyObject* x) : Number{x == Py_True} {
    if (!PyBool_Check(x)) throw pybind11::type_error("a bool is needed");
  }
};
template <> struct Argument<int64_t> : Number<int64_t> {
  explicit Argument(PyObject* x) : Number{PyLong_AsLongLong(x)} {
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  }
};
template <> struct Argument<double> : Number<double> {
  explicit Argument(PyObject* x) : Number{PyFloat_AsDouble(x)} {
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  }
};
template <> struct Argument<std::optional<double>> : Number<std::optional<double>> {
  explicit Argument(PyObject* x) : Number{} {
    if (x != Py_None) value = Argument<double>(x).get();
  }
};

// A result that is one of the arguments is the Python tensor itself.
inline PyObject* result(const Tensor& x) { return x.object.inc_ref().ptr(); }
inline PyObject* result(const std::pair<Tensor, Tensor>& x) {
  return PyTuple_Pack(2, x.first.object.ptr(), x.second.object.ptr());
}
inline PyObject* result(int64_t x) { return PyLong_FromLongLong(x); }
inline PyObject* result(const char* x) { return PyUnicode_FromString(x); }

template <class F> struct Function;
template <class F, class R, class... Args> struct Function<R (F::*)(Args...) const> {
  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    try {
      if (count != sizeof...(Args))
        throw pybind11::type_error(std::to_string(sizeof...(Args)) + " arguments are needed, not " +
                                   std::to_string(count));
      return run(args, std::index_sequence_for<Args...>{});
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (const pybind11::builtin_exception& error) {
      error.set_error();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(kernel_error(), error.what());
    }
    return nullptr;
  }

  template <size_t... I> static PyObject* run(PyObject* const* args, std::index_sequence<I...>) {
    if constexpr (std::is_void_v<R>) {
      F{}(Argument<std::decay_t<Args>>(args[I]).get()...);
      Py_RETURN_NONE;
    } else {
      return result(F{}(Argument<std::decay_t<Args>>(args[I]).get()...));
    }
  }
};

// Adds `function`, a lambda that captures nothing, to the module.
template <class F> void def(pybind11::module_& m, const char* name, F, const char* doc = nullptr) {
  static PyMethodDef method{
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(
                &Function<decltype(&F::operator())>::call)),
      METH_FASTCALL, doc};
  m.attr(name) = pybind11::reinterpret_steal<pybind11::object>(
      PyCFunction_NewEx(&method, nullptr, m.attr("__name__").ptr()));
}

}  // namespace llama_fast
