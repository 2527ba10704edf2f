#include "fastweights/io/mapped_file.hpp"

#include <filesystem>
#include <string>
#include <utility>

#include <sys/stat.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "fastweights/core/error.hpp"
#include "file_fixture.hpp"

namespace fastweights::io {
namespace {

using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::MessageMatches;
using test::get;
using test::put;

void check_refused(const std::filesystem::path& path, const std::string& cause) {
  CAPTURE(path);
  CHECK_THROWS_MATCHES(
      MappedFile(path), FileError,
      MessageMatches(ContainsSubstring(path.filename()) && ContainsSubstring(cause)));
}

TEST_CASE("a mapped file shows the file's bytes", "[io][mapped_file]") {
  const test::TemporaryFolder folder;
  const std::string content("one\0two\xff", 8);
  put(folder / "text", content);
  const MappedFile file(folder / "text");
  CHECK(file.text() == content);
  CHECK(file.bytes().size() == 8);
  CHECK(file.bytes()[7] == std::byte{0xff});
}

TEST_CASE("moving a mapped file leaves its bytes in place", "[io][mapped_file]") {
  const test::TemporaryFolder folder;
  put(folder / "a", "first");
  put(folder / "b", "second");
  MappedFile first(folder / "a");
  const std::byte* const address = first.bytes().data();
  MappedFile moved(std::move(first));
  CHECK(moved.bytes().data() == address);
  CHECK(moved.text() == "first");
  // NOLINTNEXTLINE(bugprone-use-after-move,clang-analyzer-cplusplus.Move): empty is promised
  CHECK(first.bytes().empty());
  moved = MappedFile(folder / "b");
  CHECK(moved.text() == "second");
}

TEST_CASE("a mapping outlives the file's name", "[io][mapped_file]") {
  const test::TemporaryFolder folder;
  put(folder / "a", "content");
  const MappedFile file(folder / "a");
  std::filesystem::remove(folder / "a");
  CHECK(file.text() == "content");
}

TEST_CASE("what is no readable, non-empty, regular file is refused", "[io][mapped_file]") {
  const test::TemporaryFolder folder;
  check_refused(folder / "missing", "No such file");
  check_refused(folder / "missing" / "file", "No such file");
  put(folder / "empty", "");
  check_refused(folder / "empty", "it is empty");
  check_refused(folder.path(), "Is a directory");
  check_refused("/dev/zero", "it is not a regular file");
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  check_refused(folder / "pipe", "it is not a regular file");
}

TEST_CASE("a file without read permission is refused", "[io][mapped_file]") {
  const test::TemporaryFolder folder;
  put(folder / "secret", "content");
  std::filesystem::permissions(folder / "secret", std::filesystem::perms::none);
  const test::WithoutPrivileges nobody;
  check_refused(folder / "secret", "Permission denied");
}

}  // namespace
}  // namespace fastweights::io
