// The Python module `jrl_kernels._C`: calls any registered launcher by name. The only file that knows Python.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "jrl/registry.h"
#include "jrl_build_info.h"  // written by setup.py

namespace py = pybind11;

namespace {

constexpr std::size_t kMaximumParameters = 64;

using Index = std::unordered_map<std::string_view, const jrl::Launcher*>;

const Index& launchers_by_name() {
  static const Index index = [] {
    Index result;
    for (const jrl::Launcher& launcher : jrl::registry()) {
      if (launcher.parameters.size() > kMaximumParameters) {
        throw std::runtime_error(launcher.name + " has more than 64 parameters");
      }
      if (!result.emplace(launcher.name, &launcher).second) {
        throw std::runtime_error("two launchers are named " + launcher.name);
      }
    }
    return result;
  }();
  return index;
}

std::string signature(const jrl::Launcher& launcher) {
  std::string text = launcher.name + "(";
  for (std::size_t i = 0; i < launcher.parameters.size(); ++i) {
    text += (i == 0 ? "" : ", ") + launcher.parameters[i].type;
  }
  return text + ")";
}

std::string position(const jrl::Launcher& launcher, std::size_t index) {
  return "argument " + std::to_string(index) + " of " + signature(launcher);
}

[[noreturn]] void refuse_type(const jrl::Launcher& launcher, std::size_t index, const char* expected, PyObject* value) {
  throw py::type_error(position(launcher, index) + ": expected " + expected + ", got " + Py_TYPE(value)->tp_name);
}

[[noreturn]] void refuse_value(const jrl::Launcher& launcher, std::size_t index, PyObject* value) {
  PyErr_Clear();
  throw py::value_error(position(launcher, index) + ": " + py::repr(value).cast<std::string>() + " does not fit " +
                        launcher.parameters[index].type);
}

jrl::Argument parse(const jrl::Launcher& launcher, std::size_t index, PyObject* value) {
  const jrl::Parameter& parameter = launcher.parameters[index];
  jrl::Argument argument;
  argument.unsigned_integer = 0;
  switch (parameter.kind) {
    case jrl::Kind::pointer:
      if (value == Py_None) {
        break;
      }
      if (!PyLong_CheckExact(value)) {
        refuse_type(launcher, index, "an address (int) or None", value);
      }
      argument.pointer = PyLong_AsVoidPtr(value);
      if (argument.pointer == nullptr && PyErr_Occurred() != nullptr) {
        refuse_value(launcher, index, value);
      }
      break;
    case jrl::Kind::integer:
    case jrl::Kind::boolean: {
      // Only real ints: a tensor has __index__ too, and reading it would synchronise a GPU.
      if (!PyLong_Check(value)) {
        refuse_type(launcher, index, parameter.kind == jrl::Kind::boolean ? "a bool" : "an int", value);
      }
      int overflow = 0;
      argument.integer = PyLong_AsLongLongAndOverflow(value, &overflow);
      if (overflow != 0 || argument.integer < parameter.minimum || argument.integer > parameter.maximum) {
        refuse_value(launcher, index, value);
      }
      break;
    }
    case jrl::Kind::unsigned_integer:
      if (!PyLong_Check(value)) {
        refuse_type(launcher, index, "an int", value);
      }
      argument.unsigned_integer = PyLong_AsUnsignedLongLong(value);
      if (PyErr_Occurred() != nullptr || argument.unsigned_integer > parameter.unsigned_maximum) {
        refuse_value(launcher, index, value);
      }
      break;
    case jrl::Kind::real:
      if (PyFloat_Check(value)) {
        argument.real = PyFloat_AS_DOUBLE(value);
      } else if (PyLong_Check(value)) {
        argument.real = PyLong_AsDouble(value);
        if (argument.real == -1.0 && PyErr_Occurred() != nullptr) {
          refuse_value(launcher, index, value);
        }
      } else {
        refuse_type(launcher, index, "a float", value);
      }
      break;
  }
  return argument;
}

void launch(const py::str& name, const py::args& values) {
  Py_ssize_t length = 0;
  const char* text = PyUnicode_AsUTF8AndSize(name.ptr(), &length);
  if (text == nullptr) {
    throw py::error_already_set();
  }
  const Index& index = launchers_by_name();
  const auto found = index.find(std::string_view(text, static_cast<std::size_t>(length)));
  if (found == index.end()) {
    std::vector<std::string_view> names;
    for (const auto& entry : index) {
      names.push_back(entry.first);
    }
    std::sort(names.begin(), names.end());
    std::string known;
    for (const std::string_view known_name : names) {
      known += (known.empty() ? "" : ", ") + std::string(known_name);
    }
    throw py::value_error("no launcher named '" + std::string(text) + "' was compiled; there are: " + known);
  }
  const jrl::Launcher& launcher = *found->second;
  if (values.size() != launcher.parameters.size()) {
    throw py::type_error(signature(launcher) + " takes " + std::to_string(launcher.parameters.size()) +
                         " arguments, got " + std::to_string(values.size()));
  }
  std::array<jrl::Argument, kMaximumParameters> arguments;
  for (std::size_t i = 0; i < launcher.parameters.size(); ++i) {
    arguments[i] = parse(launcher, i, PyTuple_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(i)));
  }
  int code = 0;
  {
    const py::gil_scoped_release unlocked;
    code = launcher.call(arguments.data());
  }
  if (code != 0) {
    const char* description = launcher.describe(code);
    throw std::runtime_error(launcher.name + " failed with error code " + std::to_string(code) +
                             (description == nullptr ? std::string() : std::string(": ") + description));
  }
}

py::dict launchers() {
  py::dict result;
  for (const auto& entry : launchers_by_name()) {
    result[py::str(std::string(entry.first))] = signature(*entry.second);
  }
  return result;
}

py::object build_info() { return py::module_::import("json").attr("loads")(JRL_BUILD_INFO); }

}  // namespace

PYBIND11_MODULE(_C, module) {
  launchers_by_name();  // a clash of names fails the import, not the first call
  module.doc() = "Launchers of the compiled kernels, by name.";
  module.def("launch", &launch, "launch(name, *args): run a launcher; raises RuntimeError when it reports an error.");
  module.def("launchers", &launchers, "Names of the compiled launchers, each with its signature.");
  module.def("build_info", &build_info, "What was compiled, with what, for which architectures.");
}
