#include "fastweights/session/end_to_end.hpp"

#include <cmath>
#include <string>

#include "fastweights/core/error.hpp"

namespace fastweights {

void check_end_to_end_options(const EndToEndOptions& options) {
  const auto check = [](const char* name, bool fits, const char* range, const std::string& value) {
    if (fits) return;
    throw Error(std::string("session: end_to_end.") + name + " must be " + range + ", got " +
                value);
  };
  check("learning_rate", options.learning_rate >= 0.0 && options.learning_rate <= 1000.0,
        "in [0, 1000]", std::to_string(options.learning_rate));
  check("every", options.every >= 1 && options.every <= 4096, "in [1, 4096]",
        std::to_string(options.every));
  check("clip", options.clip > 0.0 && std::isfinite(options.clip), "finite and above 0",
        std::to_string(options.clip));
}

}  // namespace fastweights
