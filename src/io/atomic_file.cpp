#include "fastweights/io/atomic_file.hpp"

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <random>
#include <system_error>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fastweights/core/error.hpp"
#include "fastweights/io/quote.hpp"

namespace fastweights::io {
namespace {

using detail::FileDescriptor;

constexpr int kMostLinks = 40;  // what Linux follows

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& cause) {
  throw FileError("cannot write " + quote(path.native()) + ": " + cause);
}

[[noreturn]] void fail(const std::filesystem::path& path, int error) {
  fail(path, std::system_category().message(error));
}

/// The file that `path` leads to, whether it exists or not.
std::filesystem::path follow_links(const std::filesystem::path& path) {
  std::filesystem::path result = path;
  std::error_code error;
  for (int links = 0; std::filesystem::is_symlink(result, error); ++links) {
    if (links == kMostLinks) fail(path, ELOOP);
    const std::filesystem::path next = std::filesystem::read_symlink(result, error);
    if (error) fail(path, error.value());
    result = result.parent_path() / next;
  }
  return result;
}

FileDescriptor open_folder(const std::filesystem::path& target) {
  const std::filesystem::path parent = target.parent_path();
  const char* const folder = parent.empty() ? "." : parent.c_str();
  const int descriptor = ::open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) fail(target, errno);
  return FileDescriptor(descriptor);
}

/// Renaming over a device would replace it, and over a folder would fail after all was written.
void check_replaceable(const std::filesystem::path& target, int folder) {
  if (!target.has_filename()) fail(target, "the path names no file");
  struct stat status = {};
  if (::fstatat(folder, target.filename().c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) {
    if (errno != ENOENT) fail(target, errno);
    return;
  }
  if (S_ISDIR(status.st_mode)) fail(target, EISDIR);
  if (!S_ISREG(status.st_mode)) fail(target, "it is not a regular file");
}

/// Of a fixed length, so that a target of the longest name that is allowed has a temporary too.
std::string temporary_name() {
  std::random_device random;
  std::array<char, 40> name{};
  std::snprintf(name.data(), name.size(), ".fastweights-%08x%08x.tmp", random(), random());
  return name.data();
}

/// All of the bytes; false with `errno` set where that fails.
bool write_fully(int descriptor, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written == 0) errno = EIO;
    if (written <= 0) return false;
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
  return true;
}

}  // namespace

AtomicFile::AtomicFile(const std::filesystem::path& target, mode_t mode)
    : target_(follow_links(target)), folder_(open_folder(target_)) {
  check_replaceable(target_, folder_.get());
  constexpr int kFlags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW;
  int descriptor = -1;
  do {
    temporary_ = temporary_name();
    descriptor = ::openat(folder_.get(), temporary_.c_str(), kFlags, mode);
  } while (descriptor < 0 && errno == EEXIST);
  if (descriptor < 0) fail(target_, errno);
  file_ = FileDescriptor(descriptor);
}

AtomicFile::~AtomicFile() { discard(); }

void AtomicFile::write(std::span<const std::byte> bytes) {
  require_open();
  check(write_fully(file_.get(), bytes) ? 0 : errno);
}

void AtomicFile::write(std::string_view text) { write(std::as_bytes(std::span(text))); }

void AtomicFile::commit() {
  require_open();
  check(::fsync(file_.get()) == 0 ? 0 : errno);
  check(file_.close());
  const std::string name = target_.filename();
  const int folder = folder_.get();
  check(::renameat(folder, temporary_.c_str(), folder, name.c_str()) == 0 ? 0 : errno);
  temporary_.clear();
  // EINVAL: a file system whose folders cannot be synced.
  if (::fsync(folder) != 0 && errno != EINVAL) {
    throw FileError(quote(target_.native()) + " is written, but its folder could not be synced: " +
                    std::system_category().message(errno));
  }
}

void AtomicFile::require_open() const {
  if (!file_.is_open()) fail(target_, "it was committed or given up before");
}

void AtomicFile::check(int error) {
  if (error == 0) return;
  discard();
  fail(target_, error);
}

void AtomicFile::discard() noexcept {
  file_.close();
  if (!temporary_.empty()) ::unlinkat(folder_.get(), temporary_.c_str(), 0);
  temporary_.clear();
}

void write_file_atomically(const std::filesystem::path& path,
                           std::span<const std::span<const std::byte>> chunks, mode_t mode) {
  AtomicFile file(path, mode);
  for (const auto& chunk : chunks) file.write(chunk);
  file.commit();
}

void write_file_atomically(const std::filesystem::path& path, std::string_view text, mode_t mode) {
  const std::span<const std::byte> chunk = std::as_bytes(std::span(text));
  write_file_atomically(path, std::span(&chunk, 1), mode);
}

}  // namespace fastweights::io
