// A libtorch program that knows nothing of tch-moba but the name of its library: consumer LIBRARY MODULE.
// Prints the sum of the module's output for inputs of ones, an error in one line, and the sum again.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <iostream>
#include <string>

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  auto module = torch::jit::load(argv[2]);
  const auto sum = [&](int64_t head_dim_k) {
    const at::Tensor q = at::ones({1, 4, 20, 8}), k = at::ones({1, 2, 20, head_dim_k}), v = at::ones({1, 2, 20, 8});
    return module.forward({q, k, v}).toTensor().sum(at::kDouble).item<double>();
  };
  std::cout << sum(8) << std::endl;
  try {
    sum(4);
  } catch (const std::exception& error) {
    std::string text = error.what();
    std::replace(text.begin(), text.end(), '\n', ' ');
    std::cout << text << std::endl;
  }
  std::cout << sum(8) << std::endl;
  return 0;
}
