#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "fastweights/session/session.hpp"
#include "session_calls.hpp"

namespace fastweights::python {

/// The options of Python's Session.write, in its order: max_tokens, temperature, top_k, top_p,
/// seed, stop, on_token, ahead, guess.
using WriteFields =
    std::tuple<std::int64_t, double, std::int64_t, double, std::optional<std::uint64_t>,
               std::vector<std::string>, pybind11::object, std::int64_t, pybind11::object>;

/// The callbacks refer to `fields`.
/// @param polls whether each token asks for signals, where no callback does
inline WriteOptions to_write_options(const WriteFields& fields, bool polls = true) {
  const auto& [max_tokens, temperature, top_k, top_p, seed, stop, on_token, ahead, guess] = fields;
  WriteOptions options{.max_tokens = max_tokens,
                       .temperature = temperature,
                       .top_k = top_k,
                       .top_p = top_p,
                       .seed = seed,
                       .stop = stop,
                       .ahead = ahead};
  if (polls || !on_token.is_none()) options.on_token = on_token_of(on_token);
  if (!guess.is_none()) options.guess = guess_of(guess);
  return options;
}

}  // namespace fastweights::python
