#include "fastweights/io/atomic_file.hpp"

#include <array>
#include <csignal>
#include <cstddef>
#include <filesystem>
#include <future>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
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
using test::names_in;
using test::put;
using Names = std::vector<std::string>;

void check_refused(const std::filesystem::path& path, const std::string& cause) {
  CAPTURE(path);
  CHECK_THROWS_MATCHES(
      write_file_atomically(path, "new"), FileError,
      MessageMatches(ContainsSubstring(path.filename()) && ContainsSubstring(cause)));
}

unsigned permissions_of(const std::filesystem::path& path) {
  return static_cast<unsigned>(std::filesystem::status(path).permissions());
}

/// For as long as it lives, the umask of the process.
class Umask {
 public:
  explicit Umask(mode_t mask) : before_(::umask(mask)) {}
  Umask(const Umask&) = delete;
  Umask& operator=(const Umask&) = delete;
  ~Umask() { ::umask(before_); }

 private:
  mode_t before_;
};

/// For as long as it lives, no file may grow beyond `bytes`: a write that would fails with EFBIG.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_before_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_before_);
  }

 private:
  void (*handler_before_)(int);
  rlimit before_{};
};

TEST_CASE("a file is made, and replaced, whole", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  write_file_atomically(folder / "file", "one");
  CHECK(get(folder / "file") == "one");
  write_file_atomically(folder / "file", std::string_view("two\0three", 9));
  CHECK(get(folder / "file") == std::string("two\0three", 9));
  write_file_atomically(folder / "file", "");
  CHECK(get(folder / "file").empty());
  CHECK(names_in(folder.path()) == Names{"file"});
}

TEST_CASE("chunks are written one after another", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  const std::string a = "first, ";
  const std::string b;
  const std::string c(1'000'000, 'x');
  const std::array chunks = {std::as_bytes(std::span(a)), std::as_bytes(std::span(b)),
                             std::as_bytes(std::span(c))};
  write_file_atomically(folder / "file", chunks);
  CHECK(get(folder / "file") == a + c);
}

TEST_CASE("the target is untouched until commit", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  put(folder / "file", "old");
  AtomicFile file(folder / "file");
  file.write("ne");
  CHECK(get(folder / "file") == "old");
  CHECK(names_in(folder.path()).size() == 2);
  file.write("w");
  file.commit();
  CHECK(get(folder / "file") == "new");
  CHECK(names_in(folder.path()) == Names{"file"});
}

TEST_CASE("without commit nothing remains", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  put(folder / "file", "old");
  const auto interrupted = [&] {
    AtomicFile file(folder / "file");
    file.write("new");
    throw Cancelled("stopped");
  };
  CHECK_THROWS_AS(interrupted(), Cancelled);
  CHECK(get(folder / "file") == "old");
  CHECK(names_in(folder.path()) == Names{"file"});
}

TEST_CASE("after commit an atomic file takes nothing more", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  AtomicFile file(folder / "file");
  file.write("content");
  file.commit();
  CHECK_THROWS_AS(file.write("more"), FileError);
  CHECK_THROWS_AS(file.commit(), FileError);
  CHECK(get(folder / "file") == "content");
}

TEST_CASE("the mode is that of a new file", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  const Umask umask(022);
  write_file_atomically(folder / "file", "x");
  CHECK(permissions_of(folder / "file") == 0644);
  write_file_atomically(folder / "file", "x", kPrivateMode);
  CHECK(permissions_of(folder / "file") == 0600);
}

TEST_CASE("a private file is private from its first byte", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  const Umask umask(0);
  AtomicFile file(folder / "file", kPrivateMode);
  const Names names = names_in(folder.path());
  REQUIRE(names.size() == 1);
  CHECK(permissions_of(folder / names[0]) == 0600);
}

TEST_CASE("a path without a folder means the current one", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(folder.path());
  AtomicFile file("file");
  std::filesystem::current_path(before);
  file.write("content");
  file.commit();
  CHECK(get(folder / "file") == "content");
}

TEST_CASE("a symbolic link is followed", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  std::filesystem::create_directory(folder / "below");
  put(folder / "below" / "file", "old");
  std::filesystem::create_symlink("below/second", folder / "first");
  std::filesystem::create_symlink("file", folder / "below" / "second");
  write_file_atomically(folder / "first", "new");
  CHECK(get(folder / "below" / "file") == "new");
  CHECK(std::filesystem::is_symlink(folder / "first"));

  std::filesystem::remove(folder / "below" / "file");
  write_file_atomically(folder / "first", "made where the link points");
  CHECK(get(folder / "below" / "file") == "made where the link points");

  std::filesystem::create_symlink("loop", folder / "loop");
  check_refused(folder / "loop", "Too many levels of symbolic links");
}

TEST_CASE("a name of the greatest length can be written", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  write_file_atomically(folder / std::string(255, 'n'), "content");
  CHECK(get(folder / std::string(255, 'n')) == "content");
  check_refused(folder / std::string(256, 'n'), "File name too long");
}

TEST_CASE("what cannot be replaced is refused", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  std::filesystem::create_directory(folder / "folder");
  check_refused(folder / "folder", "Is a directory");
  check_refused(folder / "missing" / "file", "No such file");
  check_refused("", "names no file");
  put(folder / "file", "content");
  check_refused(folder / "file" / "below", "Not a directory");
  CHECK(names_in(folder.path()) == Names{"file", "folder"});
}

TEST_CASE("what is no regular file is never replaced by one", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  check_refused(folder / "pipe", "it is not a regular file");
  std::filesystem::create_symlink("pipe", folder / "link");
  CHECK_THROWS_AS(write_file_atomically(folder / "link", "new"), FileError);
  CHECK(std::filesystem::is_fifo(folder / "pipe"));
  CHECK(names_in(folder.path()) == Names{"link", "pipe"});
}

TEST_CASE("a folder without write permission is refused", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  put(folder / "file", "old");
  std::filesystem::permissions(folder.path(), std::filesystem::perms(0555));
  {
    const test::WithoutPrivileges nobody;
    check_refused(folder / "file", "Permission denied");
  }
  CHECK(get(folder / "file") == "old");
}

TEST_CASE("a write that fails half way leaves the old file and nothing else", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  put(folder / "file", "old");
  const std::string content(1'000'000, 'x');
  {
    const FileSizeLimit limit(65536);
    AtomicFile file(folder / "file");
    CHECK_THROWS_MATCHES(file.write(content), FileError,
                         MessageMatches(ContainsSubstring("File too large")));
    CHECK(names_in(folder.path()) == Names{"file"});
    // The caller who goes on all the same must not put a part of the file in place.
    CHECK_THROWS_AS(file.write("more"), FileError);
    CHECK_THROWS_AS(file.commit(), FileError);
  }
  CHECK(get(folder / "file") == "old");
  CHECK(names_in(folder.path()) == Names{"file"});
}

/// Puts a small file system at `folder`, for this thread only. Needs the right to mount.
bool mount_small_disk(const std::filesystem::path& folder) {
  return ::unshare(CLONE_FS | CLONE_NEWNS) == 0 &&
         ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         ::mount("tmpfs", folder.c_str(), "tmpfs", 0, "size=256k") == 0;
}

TEST_CASE("a full disk leaves the old file and nothing else", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  struct Outcome {
    bool mounted = false;
    std::string message, old_content, new_content;
    Names names;
  };
  const auto fill = [&] {
    Outcome outcome;
    outcome.mounted = mount_small_disk(folder.path());
    if (!outcome.mounted) return outcome;
    write_file_atomically(folder / "file", "old");
    try {
      write_file_atomically(folder / "file", std::string(1'000'000, 'x'));
    } catch (const FileError& error) {
      outcome.message = error.what();
    }
    outcome.old_content = get(folder / "file");
    outcome.names = names_in(folder.path());
    write_file_atomically(folder / "file", "the space is free again");
    outcome.new_content = get(folder / "file");
    return outcome;
  };
  const Outcome outcome = std::async(std::launch::async, fill).get();
  if (!outcome.mounted) SKIP("no right to mount a small disk");
  CHECK_THAT(outcome.message, ContainsSubstring("No space left on device"));
  CHECK(outcome.old_content == "old");
  CHECK(outcome.names == Names{"file"});
  CHECK(outcome.new_content == "the space is free again");
}

TEST_CASE("of several writers each leaves a whole file", "[io][atomic_file]") {
  const test::TemporaryFolder folder;
  const auto content = [](char letter) { return std::string(100'000, letter); };
  write_file_atomically(folder / "file", content('a'));
  {
    std::vector<std::jthread> writers;
    for (const char letter : {'b', 'c', 'd'}) {
      writers.emplace_back([&, letter] {
        for (int i = 0; i < 10; ++i) write_file_atomically(folder / "file", content(letter));
      });
    }
    for (int i = 0; i < 50; ++i) {
      const std::string seen = get(folder / "file");
      REQUIRE(seen == content(seen.at(0)));
    }
  }
  CHECK(names_in(folder.path()) == Names{"file"});
}

}  // namespace
}  // namespace fastweights::io
