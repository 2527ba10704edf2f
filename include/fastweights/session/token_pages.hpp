#pragma once

#include <cstdint>

#include "fastweights/session/packed_tokens.hpp"
#include "fastweights/session/shared_pages.hpp"

namespace fastweights {

/// A text of token ids that copies share, at as few bytes per token as its vocabulary allows.
class TokenPages {
 public:
  /// An empty text of tokens in [0, vocabulary_size), in pages of `page_size` tokens.
  TokenPages(std::int64_t vocabulary_size, std::int64_t page_size)
      : token_bytes_(detail::token_bytes(vocabulary_size)),
        page_size_(page_size),
        pages_(page_size * token_bytes_) {}

  std::int64_t token_bytes() const { return token_bytes_; }
  std::int64_t size() const { return pages_.size() / token_bytes_; }
  /// The oldest token that is still there.
  std::int64_t begin() const { return pages_.first_page() * page_size_; }
  std::int64_t end_page() const { return pages_.end_page(); }
  std::int64_t bytes() const { return pages_.bytes(); }

  /// See SharedPages.
  std::int64_t bytes_apart(const TokenPages& other) const {
    return pages_.bytes_apart(other.pages_);
  }
  bool extend_back(const TokenPages& earlier) { return pages_.extend_back(earlier.pages_); }

  std::int64_t operator[](std::int64_t index) const {
    const std::uint8_t* at = pages_.page(index / page_size_) + index % page_size_ * token_bytes_;
    return detail::load_token(at, token_bytes_);
  }

  void push_back(std::int64_t token) {
    const std::int64_t index = size();
    resize(index + 1);
    std::uint8_t* at = pages_.edit_page(index / page_size_) + index % page_size_ * token_bytes_;
    detail::store_token(token, token_bytes_, at);
  }

  void resize(std::int64_t size) { pages_.resize(size * token_bytes_); }
  void drop_before(std::int64_t page) { pages_.drop_before(page); }
  void start_at(std::int64_t page) { pages_.start_at(page); }

 private:
  std::int64_t token_bytes_;
  std::int64_t page_size_;
  SharedPages<std::uint8_t> pages_;
};

}  // namespace fastweights
