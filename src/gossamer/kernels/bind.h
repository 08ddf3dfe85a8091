// Arguments of the bound functions: C-contiguous arrays through the buffer protocol, every property checked here.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace gsm {

template <class T> struct Element;  // buffer format character and name
template <> struct Element<float> {
  static constexpr char format = 'f';
  static constexpr const char* name = "float32";
};
template <> struct Element<double> {
  static constexpr char format = 'd';
  static constexpr const char* name = "float64";
};
template <> struct Element<int32_t> {
  static constexpr char format = 'i';
  static constexpr const char* name = "int32";
};
template <> struct Element<uint8_t> {
  static constexpr char format = 'B';
  static constexpr const char* name = "uint8";
};

[[noreturn]] inline void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

// Bindings of ops release the interpreter lock around submit(). While this thread records a program, the program keeps
// every array that comes in through Buffer, and what is given here.
void keep_if_recording(nanobind::handle object);
// For what is no op and so cannot be recorded.
void refuse_if_recording(const char* name);

// Holds the buffer of a C-contiguous array of any type for the duration of a call.
class Buffer {
 public:
  Buffer(nanobind::handle array, const char* name, bool writable) : name_(name) {
    const int flags = PyBUF_ND | PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(array.ptr(), &view_, flags) != 0) {
      PyErr_Clear();
      refuse(std::string(name) + " must be a " + (writable ? "writable, " : "") + "C-contiguous array");
    }
    if (view_.itemsize > 0 && reinterpret_cast<uintptr_t>(view_.buf) % static_cast<uintptr_t>(view_.itemsize)) {
      PyBuffer_Release(&view_);
      refuse(std::string(name) + " is not aligned to its element size; copy it first");
    }
    keep_if_recording(array);
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // The element's character in the struct module's notation; 0 for anything but one native number.
  char format() const { return view_.format && view_.format[0] && !view_.format[1] ? view_.format[0] : '\0'; }
  int dims() const { return view_.ndim; }
  int64_t size(int axis) const { return view_.shape[axis]; }
  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < view_.ndim; ++i) n *= view_.shape[i];
    return n;
  }
  void* data() const { return view_.buf; }
  const std::string& name() const { return name_; }

  std::string shape() const { return shape_text(view_.shape, view_.ndim); }
  static std::string shape_text(const Py_ssize_t* shape, int n) {
    std::string text = "[";
    for (int i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
  }

  void need_dims(int n) const {
    if (view_.ndim != n) refuse(name_ + " must have " + std::to_string(n) + " axes but has the shape " + shape());
  }
  void need_shape(std::initializer_list<Py_ssize_t> want) const {
    bool same = static_cast<size_t>(view_.ndim) == want.size();
    for (int i = 0; same && i < view_.ndim; ++i) same = view_.shape[i] == want.begin()[i];
    if (!same)
      refuse(name_ + " must have the shape " + shape_text(want.begin(), static_cast<int>(want.size())) + " but has " +
             shape());
  }

 private:
  Py_buffer view_;
  std::string name_;
};

// The same with a fixed element type; const T for inputs, T for outputs.
template <class T>
class Array : public Buffer {
 public:
  using Value = std::remove_const_t<T>;
  Array(nanobind::handle array, const char* name) : Buffer(array, name, !std::is_const_v<T>) {
    if (format() != Element<Value>::format)
      refuse(std::string(name) + " must hold " + Element<Value>::name + " values");
  }
  T* data() const { return static_cast<T*>(Buffer::data()); }
};

}  // namespace gsm
