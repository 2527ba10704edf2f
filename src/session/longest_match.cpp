#include "fastweights/session/longest_match.hpp"

#include <algorithm>
#include <bit>
#include <limits>
#include <string>

#include "fastweights/core/error.hpp"
#include "option_checks.hpp"

namespace fastweights {
namespace {

constexpr std::uint32_t kNoHash = 0;

void check_option(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  detail::check_option("longest_match", name, value, least, most);
}

[[noreturn]] void refuse(const std::string& what) { throw Error("longest_match: " + what); }

}  // namespace

LongestMatch::LongestMatch(std::int64_t vocabulary_size, const LongestMatchOptions& options)
    : vocabulary_size_(vocabulary_size),
      options_(options),
      text_(std::max<std::int64_t>(vocabulary_size, 1), kPage),
      tail_(kPage) {
  check_option("vocabulary_size", vocabulary_size, 1, std::int64_t{1} << 31);
  check_option("shortest", options.shortest, 1, 255);
  check_option("longest", options.longest, options.shortest, 255);
  check_option("candidates", options.candidates, 1, kMostCandidates);
  check_option("bytes", options.bytes, 0, std::numeric_limits<std::int64_t>::max());
}

// ---- the text ----------------------------------------------------------------------------------

void LongestMatch::push_token(std::int64_t token, bool kept) {
  if (token < 0 || token >= vocabulary_size_) {
    refuse("a token must be in [0, " + std::to_string(vocabulary_size_) + "), got " +
           std::to_string(token));
  }
  if (!kept) skip(size());
  text_.push_back(token);
}

void LongestMatch::skip(std::int64_t position) {
  auto& spans = skipped_.edit();
  if (!spans.empty() && spans.back().second == position) {
    ++spans.back().second;
  } else {
    spans.emplace_back(position, position + 1);
  }
}

bool LongestMatch::kept(std::int64_t position) const {
  const auto after =
      std::upper_bound(skipped_->begin(), skipped_->end(), position,
                       [](std::int64_t value, const auto& span) { return value < span.second; });
  return after == skipped_->end() || position < after->first;
}

std::int64_t LongestMatch::bytes() const {
  std::int64_t bytes = text_.bytes() + tail_.bytes();
  for (const auto& run : *runs_) bytes += run->bytes();
  return bytes + static_cast<std::int64_t>(skipped_->size() * sizeof(skipped_->front()));
}

std::int64_t LongestMatch::bytes_apart(const LongestMatch& other) const {
  std::int64_t bytes = text_.bytes_apart(other.text_) + tail_.bytes_apart(other.tail_);
  for (const auto& run : *runs_) {
    if (std::ranges::find(*other.runs_, run) == other.runs_->end()) bytes += run->bytes();
  }
  return bytes;
}

// ---- finding -----------------------------------------------------------------------------------

/// Of the `shortest` tokens before a position; kNoHash where they are not all there.
std::uint32_t LongestMatch::hash_at(std::int64_t position) const {
  if (position - options_.shortest < begin()) return kNoHash;
  std::uint64_t hash = 0;
  for (std::int64_t i = 1; i <= options_.shortest; ++i) {
    hash = (hash + static_cast<std::uint64_t>(token(position - i)) + 1) * 0x9E3779B97F4A7C15U;
    hash ^= hash >> 29;
  }
  return static_cast<std::uint32_t>(hash >> 32) | 1U;
}

/// How many tokens before `position` are those before the present place.
std::int64_t LongestMatch::agreement(std::int64_t position) const {
  const std::int64_t most = std::min(options_.longest, position - begin());
  std::int64_t length = 0;
  while (length < most && token(position - 1 - length) == token(size() - 1 - length)) ++length;
  return length;
}

/// Takes the position if it is a match; false once there are enough.
bool LongestMatch::offer(std::int64_t position) {
  const std::int64_t length = agreement(position);
  if (length < options_.shortest || !kept(position)) return true;
  const auto found = matches();
  if (!found.empty() && found.front().position == position) return true;  // the continued one
  matches_[static_cast<std::size_t>(match_count_++)] = {position, length};
  return match_count_ <= options_.candidates;
}

void LongestMatch::find_in_tail(std::uint32_t hash) {
  for (std::int64_t i = size() - indexed_ - 1; i >= 0; --i) {
    if (tail_[i] == hash && !offer(indexed_ + i)) return;
  }
}

void LongestMatch::find_in_run(const Run& run, std::uint32_t hash) {
  const std::size_t bucket = hash >> (32 - run.bits);
  for (auto i = run.starts[bucket]; i < run.starts[bucket + 1]; ++i) {
    const std::int64_t position = run.begin + run.positions[i];
    if (position - options_.shortest < begin() || !offer(position)) return;
  }
}

/// The matches of the present place, of which the first of those so far is continued.
void LongestMatch::find() {
  std::int64_t next = -1;
  const auto best =
      std::max_element(matches_.begin(), matches_.begin() + match_count_,
                       [](const TextMatch& a, const TextMatch& b) { return a.length < b.length; });
  if (match_count_ > 0) next = best->position + 1;
  match_count_ = 0;
  const std::uint32_t hash = hash_at(size());
  if (hash == kNoHash) return;
  if (next >= begin() + options_.shortest) offer(next);
  find_in_tail(hash);
  for (auto run = runs_->rbegin(); run != runs_->rend() && match_count_ <= options_.candidates;
       ++run) {
    find_in_run(**run, hash);
  }
}

void LongestMatch::append(std::int64_t token, bool kept) {
  ensure_index();
  const std::uint32_t hash = hash_at(size());  // the token is found by what stands before it
  push_token(token, kept);
  tail_.push_back(hash);
  if (size() % kPage == 0) {
    index_pages();
    drop_old_text();
  }
  find();
}

// ---- the index ---------------------------------------------------------------------------------

/// A counting sort by the hashes' first bits, four positions to a bucket.
std::shared_ptr<const LongestMatch::Run> LongestMatch::make_run(std::int64_t begin,
                                                                std::int64_t end) const {
  auto run = std::make_shared<Run>();
  run->begin = begin;
  run->end = end;
  run->bits = std::bit_width(static_cast<std::uint64_t>(end - begin)) - 3;
  std::vector<std::uint32_t> hashes(static_cast<std::size_t>(end - begin));
  run->starts.assign((std::size_t{1} << run->bits) + 1, 0);
  for (std::int64_t position = begin; position < end; ++position) {
    const std::uint32_t hash = hash_at(position);
    hashes[static_cast<std::size_t>(position - begin)] = hash;
    if (hash != kNoHash) ++run->starts[(hash >> (32 - run->bits)) + 1];
  }
  for (std::size_t b = 1; b < run->starts.size(); ++b) run->starts[b] += run->starts[b - 1];
  run->positions.resize(run->starts.back());
  std::vector<std::uint32_t> next(run->starts.begin(), run->starts.end() - 1);
  for (std::size_t i = hashes.size(); i-- > 0;) {
    if (hashes[i] == kNoHash) continue;
    run->positions[next[hashes[i] >> (32 - run->bits)]++] = static_cast<std::uint32_t>(i);
  }
  return run;
}

/// Indexes the full pages of the tail, and merges runs of equal length.
void LongestMatch::index_pages() {
  auto& runs = runs_.edit();
  std::int64_t first = indexed_;
  std::int64_t length = size() - indexed_;
  while (!runs.empty() && runs.back()->end - runs.back()->begin == length &&
         runs.back()->begin >= begin() && 2 * length <= std::numeric_limits<std::int32_t>::max()) {
    first = runs.back()->begin;
    length *= 2;
    runs.pop_back();
  }
  runs.push_back(make_run(first, size()));
  indexed_ = size();
  tail_.resize(0);
}

/// Drops the oldest pages until the budget is kept. The last page always stays. A run takes 5 bytes
/// per position; what is dropped stays in its run until it is a quarter of it.
void LongestMatch::drop_old_text() {
  const std::int64_t page_bytes = kPage * (text_.token_bytes() + 7);
  const std::int64_t pages = std::max<std::int64_t>(1, options_.bytes / page_bytes);
  const std::int64_t first = text_.end_page() - pages;
  if (first * kPage <= begin()) return;
  drop_text_before(first);
  auto& runs = runs_.edit();
  std::erase_if(runs, [&](const auto& run) { return run->end <= begin(); });
  if (4 * (begin() - runs.front()->begin) > runs.front()->end - runs.front()->begin) {
    runs.front() = make_run(begin(), runs.front()->end);
  }
}

void LongestMatch::drop_text_before(std::int64_t page) {
  text_.drop_before(page);
  auto& spans = skipped_.edit();
  std::erase_if(spans, [&](const auto& span) { return span.second <= begin(); });
}

/// Makes the index that of the text, if it is not: only what goes on needs one, and not every state
/// of a text that is gone back to goes on.
void LongestMatch::ensure_index() {
  if (index_fits_) return;
  const std::int64_t indexed = size() / kPage * kPage;
  auto& runs = runs_.edit();
  while (!runs.empty() && runs.back()->end > indexed) runs.pop_back();
  std::erase_if(runs, [&](const auto& run) { return run->end <= begin(); });
  if (!runs.empty() && runs.front()->begin > begin()) runs.clear();
  std::int64_t at = runs.empty() ? begin() : runs.back()->end;
  while (at < indexed) {
    const auto pages = static_cast<std::uint64_t>((indexed - at) / kPage);
    const auto end = at + static_cast<std::int64_t>(std::bit_floor(pages)) * kPage;
    runs.push_back(make_run(at, end));
    at = end;
  }
  indexed_ = indexed;
  tail_.resize(0);
  for (std::int64_t position = indexed; position < size(); ++position) {
    tail_.push_back(hash_at(position));
  }
  index_fits_ = true;
}

// ---- going back --------------------------------------------------------------------------------

void LongestMatch::set_matches(std::span<const TextMatch> matches) {
  if (std::ssize(matches) > options_.candidates + 1) refuse("there are too many matches");
  for (const TextMatch& match : matches) {
    const bool possible = match.position >= begin() && match.position < size() &&
                          kept(match.position) && match.length >= options_.shortest &&
                          agreement(match.position) == match.length;
    if (!possible) refuse("a match is none of this text");
  }
  match_count_ = std::ssize(matches);
  std::copy(matches.begin(), matches.end(), matches_.begin());
}

void LongestMatch::truncate(std::int64_t size, std::int64_t begin,
                            std::span<const TextMatch> matches) {
  if (size < 0 || size > this->size()) {
    refuse("can go back to [0, " + std::to_string(this->size()) + "] tokens, not to " +
           std::to_string(size));
  }
  if (begin < this->begin() || begin > size || begin % kPage != 0) {
    refuse("the text from " + std::to_string(begin) + " to " + std::to_string(this->begin()) +
           ", which there was at " + std::to_string(size) + ", has been dropped since");
  }
  LongestMatch then = *this;
  then.text_.resize(size);
  auto& spans = then.skipped_.edit();
  while (!spans.empty() && spans.back().first >= size) spans.pop_back();
  if (!spans.empty()) spans.back().second = std::min(spans.back().second, size);
  then.drop_text_before(begin / kPage);
  then.index_fits_ = false;
  then.set_matches(matches);
  *this = std::move(then);
}

bool LongestMatch::extend_back(const LongestMatch& earlier) {
  const std::int64_t begin = this->begin();
  if (!text_.extend_back(earlier.text_)) return false;
  auto& spans = skipped_.edit();
  const auto& older = *earlier.skipped_;
  const auto end =
      std::ranges::find_if(older, [&](const auto& span) { return span.second > begin; });
  spans.insert(spans.begin(), older.begin(), end);
  match_count_ = 0;
  index_fits_ = false;
  return true;
}

void LongestMatch::restore(std::int64_t begin, std::span<const std::int64_t> tokens,
                           std::vector<std::pair<std::int64_t, std::int64_t>> skipped,
                           std::span<const TextMatch> matches) {
  if (size() != 0) refuse("only an empty one can be restored");
  if (begin < 0 || begin % kPage != 0 ||
      begin > std::numeric_limits<std::int64_t>::max() / 8 - std::ssize(tokens)) {
    refuse("a text cannot begin at " + std::to_string(begin));
  }
  text_.start_at(begin / kPage);
  for (const std::int64_t token : tokens) push_token(token, true);
  std::int64_t last = -1;
  for (const auto& [from, to] : skipped) {
    if (from <= last || to <= from || to > size() || to <= begin) {
      refuse("the spans that were not kept must be in order and within the text");
    }
    last = to;
  }
  skipped_.edit() = std::move(skipped);
  index_fits_ = false;
  set_matches(matches);
}

}  // namespace fastweights
