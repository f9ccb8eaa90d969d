// The C side of src/dispatch.rs: calls any operator by name, and autocast state. No exception leaves this file: each
// function returns null, or a message that the caller frees with moba_free.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace moba {

// Mirrored by `Argument` in src/dispatch.rs.
struct Argument {
  int32_t tag;      // 0 None, 1 Tensor, 2 int, 3 float, 4 bool, 5 Tensor[]
  int64_t integer;  // also the number of `tensors`
  double number;
  const at::Tensor* tensor;
  const at::Tensor* const* tensors;
};

namespace {

c10::IValue to_ivalue(const Argument& argument) {
  switch (argument.tag) {
    case 1: return *argument.tensor;
    case 2: return argument.integer;
    case 3: return argument.number;
    case 4: return argument.integer != 0;
    case 5: {
      c10::List<at::Tensor> list;
      list.reserve(argument.integer);
      for (int64_t i = 0; i < argument.integer; ++i) list.push_back(*argument.tensors[i]);
      return list;
    }
    default: return {};
  }
}

c10::OperatorHandle find(const char* text) {
  const std::string name(text);
  const auto dot = name.find('.');
  const std::string base = name.substr(0, dot);
  const std::string overload = dot == std::string::npos ? "" : name.substr(dot + 1);
  const auto handle = c10::Dispatcher::singleton().findSchema({base, overload});
  TORCH_CHECK(handle.has_value(), "no such operator is registered");
  return *handle;
}

torch::jit::Stack call(const char* name, const Argument* arguments, size_t count) {
  const auto op = find(name);
  torch::jit::Stack stack;
  stack.reserve(op.schema().arguments().size());
  for (size_t i = 0; i < count; ++i) stack.push_back(to_ivalue(arguments[i]));
  op.schema().checkAndNormalizeInputs(stack, {});
  op.callBoxed(&stack);
  return stack;
}

template <typename F>
char* guarded(const F& body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& error) {
    return strdup(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("an unknown C++ exception");
  }
}

}  // namespace
}  // namespace moba

extern "C" {

char* moba_call(const char* name, const moba::Argument* arguments, size_t count, at::Tensor** outputs, size_t capacity,
                size_t* written) {
  return moba::guarded([&] {
    torch::jit::Stack stack = moba::call(name, arguments, count);
    std::vector<at::Tensor> tensors;
    for (c10::IValue& value : stack) {
      // aten's attention operators return integers among their tensors; only the tensors are handed on.
      if (value.isTensor()) {
        tensors.push_back(std::move(value).toTensor());
      } else if (value.isTensorList()) {
        for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(tensor);
      }
    }
    TORCH_CHECK(tensors.size() <= capacity, "wanted at most ", capacity, " tensors as output, got ", tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) outputs[i] = new at::Tensor(std::move(tensors[i]));
    *written = tensors.size();
  });
}

char* moba_call_text(const char* name, const moba::Argument* arguments, size_t count, char** text) {
  return moba::guarded([&] {
    const torch::jit::Stack stack = moba::call(name, arguments, count);
    TORCH_CHECK(stack.size() == 1 && stack[0].isString(), "wanted an operator that returns a text");
    *text = strdup(stack[0].toStringRef().c_str());
  });
}

char* moba_schema(const char* name, char** text) {
  return moba::guarded([&] { *text = strdup(c10::toString(moba::find(name).schema()).c_str()); });
}

void moba_free(char* text) { std::free(text); }

char* moba_autocast_get(int32_t device, int32_t* enabled, int32_t* dtype) {
  return moba::guarded([&] {
    const auto type = static_cast<c10::DeviceType>(device);
    *enabled = at::autocast::is_autocast_enabled(type);
    *dtype = static_cast<int32_t>(at::autocast::get_autocast_dtype(type));
  });
}

char* moba_autocast_set(int32_t device, int32_t enabled, int32_t dtype, int32_t nesting) {
  return moba::guarded([&] {
    const auto type = static_cast<c10::DeviceType>(device);
    at::autocast::set_autocast_enabled(type, enabled != 0);
    at::autocast::set_autocast_dtype(type, static_cast<at::ScalarType>(dtype));
    if (nesting > 0) at::autocast::increment_nesting();
    // The cast copies of weights belong to one outermost region: libtorch's own context managers drop them here too.
    if (nesting < 0 && at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  });
}

}  // extern "C"
