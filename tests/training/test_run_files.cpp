#include <unistd.h>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "fastweights/core/error.hpp"
#include "training/corpus.hpp"
#include "training/run_log.hpp"
#include "training/schedule.hpp"

namespace fs = std::filesystem;
using fastweights::FileError;

namespace {

class TemporaryFolder {
 public:
  TemporaryFolder()
      : path_(fs::temp_directory_path() / ("fastweights-" + std::to_string(getpid()))) {
    fs::remove_all(path_);
    fs::create_directories(path_);
  }
  ~TemporaryFolder() { fs::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  fs::path file(const std::string& name, const std::string& text) const {
    fs::create_directories((path_ / name).parent_path());
    std::ofstream(path_ / name, std::ios::binary) << text;
    return path_ / name;
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

std::string content(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

TEST_CASE("the learning rate warms up and falls along a cosine", "[schedule]") {
  const training::Schedule schedule{1.0, 0.1, 0.2};
  CHECK(schedule.at(0.0) > 0.0);
  CHECK(schedule.at(0.1) == 0.5);
  CHECK(schedule.at(0.2) == 1.0);
  CHECK(std::abs(schedule.at(0.6) - 0.55) < 1e-12);
  CHECK(std::abs(schedule.at(1.0) - 0.1) < 1e-12);
  CHECK(schedule.at(2.0) == schedule.at(1.0));
  for (double p = 0.2; p < 1.0; p += 0.05) CHECK(schedule.at(p + 0.05) < schedule.at(p));
}

TEST_CASE("texts are read as bytes, folders in the order of names", "[corpus]") {
  const TemporaryFolder folder;
  folder.file("plays/b.txt", "second");
  folder.file("plays/a.txt", std::string("\xff\x00 not UTF-8", 12));
  folder.file("plays/notes.md", "no text");
  const auto works =
      training::read_works({folder.path() / "plays", folder.path() / "plays/notes.md"});
  REQUIRE(works.size() == 3);
  CHECK(works[0].name == "a");
  CHECK(works[0].bytes.size() == 12);
  CHECK(works[1].bytes == "second");
  CHECK(works[2].name == "notes");
  CHECK(training::total_bytes(works) == 25);
  auto changed = works;
  changed[1].bytes[0] = 'S';
  CHECK(training::digest(works) != training::digest(changed));
}

TEST_CASE("texts that are missing or empty are refused", "[corpus]") {
  const TemporaryFolder folder;
  CHECK_THROWS_AS(training::read_works({folder.path() / "missing.txt"}), FileError);
  CHECK_THROWS_AS(training::read_works({folder.file("empty.txt", "")}), FileError);
  folder.file("none/readme.md", "text");
  CHECK_THROWS_AS(training::read_works({folder.path() / "none"}), FileError);
}

TEST_CASE("a resumed log keeps the steps up to the checkpoint", "[run_log]") {
  const TemporaryFolder folder;
  const fs::path path =
      folder.file("log.jsonl", "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"step\":");
  training::RunLog(path, 2).write({{"step", 3}, {"again", true}});
  CHECK(content(path) == "{\"step\":1}\n{\"step\":2}\n{\"again\":true,\"step\":3}\n");
  training::RunLog(path, -1).write({{"step", 1}});
  CHECK(content(path) == "{\"step\":1}\n");
}
