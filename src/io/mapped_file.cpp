#include "fastweights/io/mapped_file.hpp"

#include <cerrno>
#include <cstdint>
#include <string>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "fastweights/core/error.hpp"
#include "fastweights/io/file_descriptor.hpp"
#include "fastweights/io/quote.hpp"

namespace fastweights::io {
namespace {

[[noreturn]] void fail(const std::filesystem::path& path, int error) {
  throw FileError("cannot read " + quote(path.native()) + ": " +
                  std::system_category().message(error));
}

detail::FileDescriptor open_to_read(const std::filesystem::path& path) {
  // Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) fail(path, errno);
  return detail::FileDescriptor(descriptor);
}

std::size_t checked_size(const std::filesystem::path& path, int descriptor) {
  struct stat status = {};
  if (::fstat(descriptor, &status) != 0) fail(path, errno);
  if (S_ISDIR(status.st_mode)) fail(path, EISDIR);
  if (!S_ISREG(status.st_mode)) {
    throw FileError("cannot read " + quote(path.native()) + ": it is not a regular file");
  }
  if (status.st_size == 0) throw FileError("cannot read " + quote(path.native()) + ": it is empty");
  if (static_cast<std::uintmax_t>(status.st_size) > SIZE_MAX) fail(path, EFBIG);
  return static_cast<std::size_t>(status.st_size);
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  const detail::FileDescriptor file = open_to_read(path);
  const std::size_t size = checked_size(path, file.get());
  void* const address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (address == MAP_FAILED) fail(path, errno);
  bytes_ = {static_cast<const std::byte*>(address), size};
}

MappedFile::MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

std::string_view MappedFile::text() const noexcept {
  return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()};
}

}  // namespace fastweights::io
