#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "corpus.hpp"
#include "random.hpp"

namespace training {

/// The next T bytes of every row, and for each of them the byte that comes next.
struct Segment {
  at::Tensor inputs;   ///< int64 [B, T]; 0 after the end of a work
  at::Tensor targets;  ///< int64 [B, T]; `kIgnored` where nothing is to be predicted
  at::Tensor fresh;    ///< bool [B]: rows whose state must be empty before this segment
  int64_t bytes = 0;   ///< targets that count
};

constexpr int64_t kIgnored = -100;

struct StreamOptions {
  int64_t rows = 8;
  int64_t segment = 512;            ///< T
  double reset_probability = 0.0;   ///< that a row forgets at a segment's boundary, in mid-work
  double repeat_probability = 0.0;  ///< that a row reads a passage again within a segment
  uint64_t seed = 0;
};

/// The training data as `rows` streams. Each row reads its own work from front to back, segment
/// after segment, so that the state carried from one segment to the next is that of the text
/// before; at the end of a work the row is marked fresh and goes on with the next one. The works
/// are dealt out from a shuffled deck; each row's first work is entered at a random offset, so that
/// rows are at different places.
///
/// Planted repeats: natural text gives little reason to keep what was read thousands of bytes ago,
/// so a passage of 64–256 bytes that the row read 256…16384 bytes (log-uniform) earlier is spliced
/// in again, whole lines where lines are near.
class BatchStream {
 public:
  /// `works` must outlive the stream.
  BatchStream(const std::vector<Work>& works, const StreamOptions& options);

  Segment next();

  /// Everything that decides what `next` returns, by name; `restore` of another stream over the
  /// same works and options continues exactly. `restore` throws `fastweights::StateMismatch`.
  std::map<std::string, at::Tensor> save() const;
  void restore(const std::map<std::string, at::Tensor>& tensors);

 private:
  struct Row {
    int64_t work = 0;
    int64_t offset = 0;   // of the next byte that is not yet a target
    std::string history;  // what the row read, its latest bytes; empty: starts a work
  };
  struct Repeat {
    int64_t place;  // in the segment
    std::string passage;
  };

  void start_work(Row& row);
  int64_t deal();
  std::optional<Repeat> plan_repeat(const Row& row, std::string_view ahead);
  std::string read(Row& row);

  const std::vector<Work>& works_;
  StreamOptions options_;
  Random random_;
  std::vector<int64_t> deck_;  // works still to be dealt, last first
  std::vector<Row> rows_;
};

}  // namespace training
