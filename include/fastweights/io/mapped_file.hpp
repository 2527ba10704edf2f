#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string_view>

namespace fastweights::io {

/// A whole file, mapped read-only for as long as the object lives. Moving it leaves the bytes where
/// they are, so spans into them stay valid.
///
/// As with every mapping, a file that another process cuts short meanwhile raises SIGBUS when the
/// missing part is touched. Files that this library replaces are safe: it never writes into an old
/// file, it renames a new one over it, and the mapping keeps the old one.
class MappedFile {
 public:
  /// Throws FileError, naming the file and the cause, if it is missing, empty, unreadable or not a
  /// regular file (a folder, a device, a pipe).
  explicit MappedFile(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  /// Never empty, except after a move.
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return bytes_; }
  /// The same bytes as characters; they need not be UTF-8.
  [[nodiscard]] std::string_view text() const noexcept;

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace fastweights::io
