#include "corpus.hpp"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <string_view>
#include <system_error>

#include "fastweights/core/error.hpp"

namespace training {
namespace {

namespace fs = std::filesystem;

std::vector<fs::path> texts_below(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file() && entry.path().extension() == ".txt")
      files.push_back(entry.path());
  }
  if (files.empty()) {
    throw fastweights::FileError("texts: folder " + folder.string() + " holds no .txt file");
  }
  std::sort(files.begin(), files.end());
  return files;
}

Work read_work(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw fastweights::FileError("texts: cannot open " + path.string());
  Work work{path.stem().string(), std::string(std::istreambuf_iterator<char>(file), {})};
  if (file.bad()) throw fastweights::FileError("texts: cannot read " + path.string());
  // One byte predicts nothing: a work needs an input and a target.
  if (work.bytes.size() < 2) throw fastweights::FileError("texts: " + path.string() + " is empty");
  return work;
}

}  // namespace

std::vector<Work> read_works(const std::vector<fs::path>& paths) {
  std::vector<Work> works;
  for (const fs::path& path : paths) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (!fs::exists(status)) {
      throw fastweights::FileError("texts: " + path.string() + " does not exist");
    }
    if (!fs::is_directory(status)) {
      works.push_back(read_work(path));
      continue;
    }
    for (const fs::path& file : texts_below(path)) works.push_back(read_work(file));
  }
  return works;
}

size_t total_bytes(const std::vector<Work>& works) {
  size_t total = 0;
  for (const Work& work : works) total += work.bytes.size();
  return total;
}

std::string digest(const std::vector<Work>& works) {
  uint64_t hash = 0xcbf29ce484222325ULL;
  const auto mix = [&hash](std::string_view bytes) {
    for (const char byte : bytes) {
      hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3ULL;
    }
    hash = (hash ^ bytes.size()) * 0x100000001b3ULL;  // so that boundaries count
  };
  for (const Work& work : works) {
    mix(work.name);
    mix(work.bytes);
  }
  std::string text(16, '0');
  for (size_t i = 0; i < text.size(); ++i)
    text[i] = "0123456789abcdef"[(hash >> (60 - 4 * i)) & 15];
  return text;
}

}  // namespace training
