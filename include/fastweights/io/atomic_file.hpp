#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include <sys/types.h>

#include "fastweights/io/file_descriptor.hpp"

namespace fastweights::io {

/// Permissions of a new file; the process's umask is taken off, as from every new file.
inline constexpr mode_t kPublicMode = 0666;
/// For files that hold what somebody read or wrote: only their owner may open them.
inline constexpr mode_t kPrivateMode = 0600;

/// A file that appears whole or not at all. It is written under a temporary name beside the target;
/// `commit` syncs it, renames it over the target and syncs the folder. Until then, and after any
/// failure (a full disk, an exception that destroys the object), the target is as it was, and the
/// temporary file is gone. Only the end of the process itself (SIGKILL, a power cut) can leave one,
/// named `.fastweights-*.tmp`.
///
/// A symbolic link is followed: the file it points to is replaced. Every failure is a FileError
/// that names the target and the cause. Several writers of one target may run at once: the last one
/// to commit wins.
class AtomicFile {
 public:
  /// Creates the temporary file. The target must be a regular file or absent (a device is never
  /// replaced), in a folder that exists.
  explicit AtomicFile(const std::filesystem::path& target, mode_t mode = kPublicMode);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  /// Appends. After a failure the file is given up: nothing more can be written or committed.
  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);

  /// Puts the file in the target's place; once. If only the last step fails, the sync of the
  /// folder, the message says so: then the new file is in place, but may not survive a power cut.
  void commit();

 private:
  void require_open() const;
  void check(int error);  // an errno; unless it is 0, discards and throws
  void discard() noexcept;

  std::filesystem::path target_;
  detail::FileDescriptor folder_;
  detail::FileDescriptor file_;
  std::string temporary_;  // name within the folder; empty when there is none
};

/// Writes the chunks, one after another, as the whole content of `path`, through an AtomicFile.
void write_file_atomically(const std::filesystem::path& path,
                           std::span<const std::span<const std::byte>> chunks,
                           mode_t mode = kPublicMode);

/// The same for one piece of text.
void write_file_atomically(const std::filesystem::path& path, std::string_view text,
                           mode_t mode = kPublicMode);

}  // namespace fastweights::io
