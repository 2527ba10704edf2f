#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json_fwd.hpp>

namespace training {

/// One JSON object a line, each with a `step`.
class RunLog {
 public:
  /// Keeps what the file holds up to `last_step` and drops the rest: a resumed run takes those
  /// steps again. A negative `last_step` starts an empty log. Throws `fastweights::FileError`.
  RunLog(const std::filesystem::path& path, int64_t last_step);

  void write(const nlohmann::json& record);

 private:
  std::filesystem::path path_;
  std::ofstream file_;
};

}  // namespace training
