#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace fastweights {

/// A place in what a session read and wrote. Its number is like no other mark's, of any session and
/// process, but for copies of one session, which share the marks that were made before they parted.
struct Mark {
  std::uint64_t id = 0;

  bool operator==(const Mark&) const = default;
};

/// What became of a mark.
enum class MarkStatus : std::uint8_t {
  kValid = 0,
  kRolledBack = 1,  ///< the session was rolled back to before it
  kCommitted = 2,   ///< commit() dropped the log before it
};

/// A mark as a session holds it.
struct MarkEntry {
  Mark mark;
  std::int64_t position = 0;  ///< tokens before it
  MarkStatus status = MarkStatus::kValid;

  bool operator==(const MarkEntry&) const = default;
};

/// The marks of a session, in the order in which they were made. Copies share their entries until
/// one of them changes. No LibTorch.
class MarkTable {
 public:
  MarkTable();

  /// From stored entries; throws Error if a number is there twice, or the position of a valid mark
  /// is not in [begin, end] or before that of an earlier one.
  static MarkTable from_entries(std::vector<MarkEntry> entries, std::int64_t begin,
                                std::int64_t end);

  /// A new mark.
  Mark add(std::int64_t position);
  /// Where a mark stands; throws Error if it is not valid any more, or is not of this session.
  std::int64_t position(const Mark& mark) const;

  /// The log ends at `end` now: marks behind it are not valid any more.
  void truncate(std::int64_t end);
  /// Tokens [begin, end) are gone: marks among them stand at `begin`, marks behind them move along.
  void erase(std::int64_t begin, std::int64_t end);
  /// No mark is valid any more.
  void commit();

  /// Of those that are not valid any more only the newest are remembered.
  std::span<const MarkEntry> entries() const { return *entries_; }

  bool operator==(const MarkTable& other) const { return *entries_ == *other.entries_; }

 private:
  template <class Change>
  void change(Change change);

  std::shared_ptr<const std::vector<MarkEntry>> entries_;
};

}  // namespace fastweights
