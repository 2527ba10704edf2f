#include "guesses.hpp"

#include <algorithm>
#include <iterator>

#include "fastweights/io/tokenizer.hpp"

namespace fastweights::detail {
namespace {

/// Tokens of the session's text in which guesses are looked up.
constexpr std::int64_t kLookBack = 65536;

}  // namespace

Guesses::Guesses(const WriteOptions& options, const SessionLog& log)
    : options_(options), text_(log.vocabulary_size(), {}), wanted_(options.ahead) {
  if (options.ahead == 0 || options.guess) return;
  const std::int64_t begin = std::max(log.start(), log.end() - kLookBack);
  for (const std::int64_t token : log.tokens(begin, log.end())) text_.append(token);
}

void Guesses::append(std::int64_t token, bool foreseen) {
  if (options_.ahead == 0) return;
  came_true_ += foreseen ? 1 : 0;
  if (options_.guess) {
    unsaid_ += io::ByteTokenizer().decode({&token, 1});
  } else {
    text_.append(token);
  }
}

std::span<const std::int64_t> Guesses::next(std::int64_t most) {
  if (options_.ahead == 0) return {};
  if (!guesses_.empty()) wanted_ = std::min(options_.ahead, 2 * came_true_ + 1);
  came_true_ = 0;
  guesses_.clear();
  most = std::min(most, wanted_);
  if (most > 0) options_.guess ? ask(most) : look_up(most);
  return guesses_;
}

void Guesses::look_up(std::int64_t most) {
  const auto matches = text_.matches();
  const auto longest = std::ranges::max_element(matches, {}, &TextMatch::length);
  if (longest == matches.end()) return;
  const std::int64_t end = std::min(text_.size(), longest->position + most);
  for (std::int64_t at = longest->position; at < end; ++at) guesses_.push_back(text_.token(at));
}

void Guesses::ask(std::int64_t most) {
  const std::string said = options_.guess(unsaid_, most);
  unsaid_.clear();
  guesses_ =
      io::ByteTokenizer().encode(std::string_view(said).substr(0, static_cast<std::size_t>(most)));
}

}  // namespace fastweights::detail
