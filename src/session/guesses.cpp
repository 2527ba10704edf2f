#include "guesses.hpp"

#include <algorithm>
#include <iterator>

#include "fastweights/io/tokenizer.hpp"

namespace fastweights::detail {
namespace {

/// Tokens of the session's text in which guesses are looked up.
constexpr std::int64_t kLookBack = 65536;

/// Tokens that must agree.
constexpr std::int64_t kContext = 6;

constexpr int kTableBits = 16;

/// The longest pause.
constexpr std::int64_t kLongestPause = 32;

}  // namespace

TextLookup::TextLookup() : last_(std::size_t{1} << kTableBits) {}

std::size_t TextLookup::bucket() const {
  std::uint64_t hash = 0;
  for (std::int64_t i = 1; i <= kContext; ++i) {
    hash = (hash + static_cast<std::uint64_t>(text_[text_.size() - static_cast<std::size_t>(i)])) *
           0x9E3779B97F4A7C15U;
  }
  return static_cast<std::size_t>(hash >> (64 - kTableBits));
}

/// Whether the tokens before `position` are the last ones of the text.
bool TextLookup::agrees(std::int64_t position) const {
  return position >= kContext &&
         std::equal(text_.end() - kContext, text_.end(), text_.begin() + position - kContext);
}

void TextLookup::append(std::int64_t token) {
  const bool follows = found_ > 0 && text_[static_cast<std::size_t>(found_)] == token;
  text_.push_back(token);
  if (std::ssize(text_) < kContext) return;
  std::int64_t& last = last_[bucket()];
  if (follows) {
    ++found_;
  } else {
    found_ = agrees(last) ? last : 0;
  }
  last = std::ssize(text_);
}

std::vector<std::int64_t> TextLookup::following(std::int64_t most) const {
  if (found_ == 0) return {};
  const auto first = text_.begin() + found_;
  return {first, first + std::min(most, std::ssize(text_) - found_)};
}

Guesses::Guesses(const WriteOptions& options, const SessionLog& log)
    : options_(options), wanted_(options.ahead) {
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
  if (!guesses_.empty()) learn();
  guesses_.clear();
  most = std::min(most, wanted_);
  if (waiting_ > 0) {
    --waiting_;
  } else if (most > 0) {
    if (options_.guess) {
      ask(most);
    } else {
      guesses_ = text_.following(most);
    }
  }
  return guesses_;
}

/// Sees what became of the last guesses.
void Guesses::learn() {
  wanted_ = std::min(options_.ahead, 2 * came_true_ + 1);
  pause_ = came_true_ > 0 ? 0 : std::min(kLongestPause, 2 * pause_ + 1);
  waiting_ = pause_;
  came_true_ = 0;
}

void Guesses::ask(std::int64_t most) {
  const std::string said = options_.guess(unsaid_, most);
  unsaid_.clear();
  guesses_ =
      io::ByteTokenizer().encode(std::string_view(said).substr(0, static_cast<std::size_t>(most)));
}

}  // namespace fastweights::detail
