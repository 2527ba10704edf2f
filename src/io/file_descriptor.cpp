#include "fastweights/io/file_descriptor.hpp"

#include <cerrno>

#include <unistd.h>

namespace fastweights::io::detail {

int FileDescriptor::close() noexcept {
  if (descriptor_ < 0) return 0;
  // Linux has let the descriptor go when close() is interrupted: another try could close another's.
  const bool failed = ::close(std::exchange(descriptor_, -1)) != 0 && errno != EINTR;
  return failed ? errno : 0;
}

}  // namespace fastweights::io::detail
