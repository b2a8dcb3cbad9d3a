// A launcher is an ordinary typed function over raw pointers and sizes that returns 0 or an error code.
// `JRL_LAUNCHER(function);` at namespace scope makes it callable from Python as `launch("function", ...)`, so that a
// new op adds its source files and edits nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace jrl {

union Argument {
  void* pointer;
  std::int64_t integer;
  std::uint64_t unsigned_integer;
  double real;
};

enum class Kind { pointer, integer, unsigned_integer, boolean, real };

struct Parameter {
  Kind kind;
  std::string type;      // as shown to the caller, e.g. "float32*"
  std::int64_t minimum;  // of a signed integer
  std::int64_t maximum;  // of a signed integer
  std::uint64_t unsigned_maximum;
};

struct Launcher {
  std::string name;
  std::vector<Parameter> parameters;
  int (*call)(const Argument*);
  const char* (*describe)(int code);  // text of an error code; null when the code has none
};

// One registry for the whole extension: an inline function's static is merged by the linker.
inline std::vector<Launcher>& registry() {
  static std::vector<Launcher> launchers;
  return launchers;
}

namespace detail {

template <class T>
std::string scalar_name() {
  if constexpr (std::is_void_v<T>) {
    return "void";
  } else if constexpr (std::is_same_v<T, bool>) {
    return "bool";
  } else if constexpr (std::is_floating_point_v<T>) {
    return "float" + std::to_string(8 * sizeof(T));
  } else if constexpr (std::is_integral_v<T>) {
    return (std::is_signed_v<T> ? "int" : "uint") + std::to_string(8 * sizeof(T));
  } else {
    return "opaque";
  }
}

template <class T>
Parameter parameter() {
  constexpr std::int64_t low = std::numeric_limits<std::int64_t>::min();
  constexpr std::int64_t high = std::numeric_limits<std::int64_t>::max();
  constexpr std::uint64_t unsigned_high = std::numeric_limits<std::uint64_t>::max();
  if constexpr (std::is_pointer_v<T>) {
    using Pointee = std::remove_pointer_t<T>;
    const std::string constness = std::is_const_v<Pointee> ? "const " : "";
    return {Kind::pointer, constness + scalar_name<std::remove_cv_t<Pointee>>() + "*", low, high, unsigned_high};
  } else if constexpr (std::is_same_v<T, bool>) {
    return {Kind::boolean, "bool", 0, 1, 1};
  } else if constexpr (std::is_floating_point_v<T>) {
    return {Kind::real, scalar_name<T>(), low, high, unsigned_high};
  } else {
    static_assert(std::is_integral_v<T>, "a launcher takes pointers, integers, booleans and floating-point numbers");
    if constexpr (std::is_signed_v<T>) {
      return {Kind::integer, scalar_name<T>(), std::numeric_limits<T>::min(), std::numeric_limits<T>::max(),
              unsigned_high};
    } else {
      return {Kind::unsigned_integer, scalar_name<T>(), 0, high, std::numeric_limits<T>::max()};
    }
  }
}

template <class T>
T unpack(const Argument& argument) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(argument.pointer);
  } else if constexpr (std::is_same_v<T, bool>) {
    return argument.integer != 0;
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(argument.real);
  } else if constexpr (std::is_signed_v<T>) {
    return static_cast<T>(argument.integer);
  } else {
    return static_cast<T>(argument.unsigned_integer);
  }
}

template <class Result>
const char* describe(int code) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<Result, cudaError_t>) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
#endif
  (void)code;
  return nullptr;
}

template <auto function>
struct Traits;

template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Traits<function> {
  static_assert(std::is_integral_v<Result> || std::is_enum_v<Result>, "a launcher returns 0 or an error code");

  template <std::size_t... index>
  static int call_unpacked(const Argument* arguments, std::index_sequence<index...>) {
    (void)arguments;
    return static_cast<int>(function(unpack<Parameters>(arguments[index])...));
  }

  static int call(const Argument* arguments) {
    return call_unpacked(arguments, std::index_sequence_for<Parameters...>{});
  }

  static Launcher launcher(const char* name) { return {name, {parameter<Parameters>()...}, &call, &describe<Result>}; }
};

template <auto function>
bool add(const char* name) {
  registry().push_back(Traits<function>::launcher(name));
  return true;
}

}  // namespace detail
}  // namespace jrl

#define JRL_LAUNCHER(function) \
  [[maybe_unused]] static const bool jrl_registered_##function = ::jrl::detail::add<&function>(#function)

// For templates: `name##_f32_cpu` and `name##_f64_cpu` run function<float> and function<double>.
#define JRL_CPU_LAUNCHERS(name, function)                        \
  [[maybe_unused]] static const bool jrl_registered_##name[] = { \
      ::jrl::detail::add<&function<float>>(#name "_f32_cpu"), ::jrl::detail::add<&function<double>>(#name "_f64_cpu")}
