#include "run_log.hpp"

#include <nlohmann/json.hpp>
#include <string>

#include "fastweights/core/error.hpp"
#include "fastweights/io/atomic_file.hpp"

namespace training {
namespace {

std::string records_up_to(const std::filesystem::path& path, int64_t last_step) {
  std::ifstream file(path);
  std::string kept;
  for (std::string line; std::getline(file, line);) {
    const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    // A line that was cut short by a crash is no record.
    if (!record.is_object() || record.value("step", int64_t{0}) > last_step) continue;
    kept += line + '\n';
  }
  return kept;
}

}  // namespace

RunLog::RunLog(const std::filesystem::path& path, int64_t last_step) : path_(path) {
  const std::string kept = last_step < 0 ? std::string() : records_up_to(path, last_step);
  fastweights::io::write_file_atomically(path, kept);
  file_.open(path, std::ios::binary | std::ios::app);
  if (!file_) throw fastweights::FileError("log: cannot write " + path.string());
}

void RunLog::write(const nlohmann::json& record) {
  file_ << record.dump() << '\n' << std::flush;
  if (!file_) throw fastweights::FileError("log: cannot write " + path_.string());
}

}  // namespace training
