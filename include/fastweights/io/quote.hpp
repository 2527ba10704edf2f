#pragma once

#include <string>
#include <string_view>

namespace fastweights::io {

/// `text` in single quotes, safe to print and valid UTF-8 whatever its bytes are: control
/// characters, quotes, backslashes and bytes that are no UTF-8 are escaped, and what lies behind
/// the first 1000 bytes is replaced by `...`. For names and paths in error messages.
std::string quote(std::string_view text);

}  // namespace fastweights::io
