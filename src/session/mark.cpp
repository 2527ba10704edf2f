#include "fastweights/session/mark.hpp"

#include <algorithm>
#include <atomic>
#include <random>
#include <string>
#include <unordered_set>
#include <utility>

#include "fastweights/core/error.hpp"
#include "fastweights/session/generator.hpp"

namespace fastweights {
namespace {

/// Marks that are not valid any more, of which a session still knows why.
constexpr std::ptrdiff_t kRemembered = 4096;

std::uint64_t random_bits() {
  std::random_device device;
  return (std::uint64_t{device()} << 32) ^ device();
}

/// A number like no other: a counter that starts at random in each process, and steps far.
std::uint64_t new_id() {
  static std::atomic<std::uint64_t> next{random_bits()};
  std::uint64_t id = 0;
  while (id == 0) id = next.fetch_add(0x9E3779B97F4A7C15U);  // odd: all numbers come up
  return id;
}

bool valid(const MarkEntry& entry) { return entry.status == MarkStatus::kValid; }

void forget_old(std::vector<MarkEntry>& entries) {
  auto excess = std::ssize(entries) - std::ranges::count_if(entries, valid) - kRemembered;
  std::erase_if(entries, [&](const MarkEntry& entry) { return !valid(entry) && excess-- > 0; });
}

}  // namespace

MarkTable::MarkTable() : entries_(std::make_shared<std::vector<MarkEntry>>()) {}

MarkTable MarkTable::from_entries(std::vector<MarkEntry> entries, std::int64_t begin,
                                  std::int64_t end) {
  std::unordered_set<std::uint64_t> seen;
  for (const MarkEntry& entry : entries) {
    if (!seen.insert(entry.mark.id).second) {
      throw Error("session: mark " + std::to_string(entry.mark.id) + " is there twice");
    }
    if (!valid(entry)) continue;
    if (entry.position < begin || entry.position > end) {
      throw Error("session: the position of a mark must be in [" + std::to_string(begin) + ", " +
                  std::to_string(end) + "], got " + std::to_string(entry.position));
    }
    begin = entry.position;
  }
  MarkTable table;
  table.entries_ = std::make_shared<const std::vector<MarkEntry>>(std::move(entries));
  return table;
}

template <class Change>
void MarkTable::change(Change change) {
  std::vector<MarkEntry> entries = *entries_;
  change(entries);
  entries_ = std::make_shared<const std::vector<MarkEntry>>(std::move(entries));
}

Mark MarkTable::add(std::int64_t position) {
  const Mark mark{new_id()};
  change([&](auto& entries) { entries.push_back({mark, position, MarkStatus::kValid}); });
  return mark;
}

std::int64_t MarkTable::position(const Mark& mark) const {
  const auto found = std::find_if(entries_->rbegin(), entries_->rend(),
                                  [&](const MarkEntry& entry) { return entry.mark == mark; });
  const std::string name = "session: mark " + std::to_string(mark.id) + " ";
  if (found == entries_->rend()) {
    throw Error(name + "is none of this session's: another session made it, or it is long gone");
  }
  if (found->status == MarkStatus::kRolledBack) {
    throw Error(name + "is not valid any more: the session was rolled back to before it");
  }
  if (found->status == MarkStatus::kCommitted) {
    throw Error(name + "is not valid any more: commit() dropped the log before it");
  }
  return found->position;
}

void MarkTable::truncate(std::int64_t end) {
  change([&](auto& entries) {
    for (MarkEntry& entry : entries) {
      if (valid(entry) && entry.position > end) entry.status = MarkStatus::kRolledBack;
    }
    forget_old(entries);
  });
}

void MarkTable::erase(std::int64_t begin, std::int64_t end) {
  change([&](auto& entries) {
    for (MarkEntry& entry : entries) {
      if (valid(entry) && entry.position > begin) {
        entry.position = std::max(begin, entry.position - (end - begin));
      }
    }
  });
}

void MarkTable::commit() {
  change([&](auto& entries) {
    for (MarkEntry& entry : entries) {
      if (valid(entry)) entry.status = MarkStatus::kCommitted;
    }
    forget_old(entries);
  });
}

}  // namespace fastweights
