/// \file
/// For test_safetensors_cross.py, which holds our reader and writer against the reference package:
///   safetensors_tool check FILE...     prints for each file "ok", or why it is refused
///   safetensors_tool rewrite IN OUT    reads IN and writes its content to OUT
#include <cstddef>
#include <cstdio>
#include <exception>
#include <span>
#include <string_view>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/io/safetensors.hpp"

namespace {

namespace io = fastweights::io;

int check(std::span<char*> paths) {
  for (const char* path : paths) {
    try {
      const io::SafetensorsFile file(path);
      std::puts("ok");
    } catch (const fastweights::FileError& error) {
      std::puts(error.what());
    }
  }
  return 0;
}

int rewrite(const char* from, const char* to) {
  const io::SafetensorsFile file(from);
  const io::SafetensorsView& view = file.view();
  std::vector<io::TensorData> tensors;
  for (const io::TensorInfo& tensor : view.tensors()) {
    tensors.push_back({tensor.name, tensor.type, tensor.shape, view.bytes(tensor)});
  }
  io::write_safetensors(to, tensors, view.metadata());
  return 0;
}

int run(std::span<char*> arguments) {
  const std::string_view command = arguments.size() > 1 ? arguments[1] : "";
  if (command == "check") return check(arguments.subspan(2));
  if (command == "rewrite" && arguments.size() == 4) return rewrite(arguments[2], arguments[3]);
  std::fputs("usage: safetensors_tool check FILE... | rewrite IN OUT\n", stderr);
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv, static_cast<std::size_t>(argc)});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
